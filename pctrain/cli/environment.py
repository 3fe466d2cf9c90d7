"""Environment variables that must be set before torch, vLLM or a tokenizer is imported."""

from __future__ import annotations

import os


def set_environment() -> None:
    """Set the variables that libraries read at import. A variable that the user has set keeps its value."""
    defaults = {
        # The engine runs in the learner's process. In a separate process its weights could not be updated in place.
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        # The tokenizer's threads do not survive the fork of worker processes.
        "TOKENIZERS_PARALLELISM": "false",
        # Every model is a local directory. Without this a typo costs minutes of retries against the hub.
        "HF_HUB_OFFLINE": "1",
        # vLLM's extension logs on every rank how it binds memory to the NUMA node.
        "TORCH_CPP_LOG_LEVEL": "ERROR",
    }
    if not _has_gpu():
        # Ranks, engine and verifiers share the cores: two processes with two threads each on two cores are ten times
        # slower than with one.
        defaults["OMP_NUM_THREADS"] = "1"
        # On a CPU, compiling takes longer than a small model's whole run, and vLLM would try.
        defaults["TORCHDYNAMO_DISABLE"] = "1"
    for name, value in defaults.items():
        os.environ.setdefault(name, value)


def _has_gpu() -> bool:
    """Return whether a CUDA device is visible, without importing torch."""
    return os.environ.get("CUDA_VISIBLE_DEVICES") not in ("", "-1") and os.path.exists("/dev/nvidiactl")
