"""Environment variables that must be set before torch, vLLM or a tokenizer is imported."""

from __future__ import annotations

import ctypes
import glob
import importlib.util
import os
import sysconfig


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
    if _has_gpu():
        _share_cudnn()
    else:
        # Ranks, engine and verifiers share the cores: two processes with two threads each on two cores are ten times
        # slower than with one.
        defaults["OMP_NUM_THREADS"] = "1"
        # On a CPU, compiling takes longer than a small model's whole run, and vLLM would try.
        defaults["TORCHDYNAMO_DISABLE"] = "1"
    for name, value in defaults.items():
        os.environ.setdefault(name, value)


def _share_cudnn() -> None:
    """Make Transformer Engine load the cuDNN of torch's wheel, unless the user names another folder.

    It takes the system's if there is one, and the process would have two. With CUDNN_PATH it takes libcudnn from there,
    but the loader does not find the libraries next to it, which its own core is linked with: they are loaded here.
    """
    folder = os.path.join(sysconfig.get_path("purelib"), "nvidia", "cudnn")
    libraries = glob.glob(os.path.join(folder, "lib", "libcudnn*.so.*"))
    if not libraries or importlib.util.find_spec("transformer_engine") is None or os.environ.get("CUDNN_HOME"):
        return
    if os.environ.setdefault("CUDNN_PATH", folder) != folder:
        return
    # Those first that others are linked with: they would come from LD_LIBRARY_PATH.
    first = ("libcudnn_graph.", "libcudnn_ops.")
    for library in sorted(libraries, key=lambda path: (not os.path.basename(path).startswith(first), path)):
        ctypes.CDLL(library, mode=ctypes.RTLD_GLOBAL)


def _has_gpu() -> bool:
    """Return whether a CUDA device is visible, without importing torch."""
    return not gpus_are_hidden() and os.path.exists("/dev/nvidiactl")


def gpus_are_hidden() -> bool:
    """Return whether CUDA_VISIBLE_DEVICES hides every GPU."""
    return os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1")
