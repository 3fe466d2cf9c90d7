"""The rollout engine: start, sleep, weight updates; greedy samples against a fresh engine's after each update.

Without a GPU the engine never sleeps, and updates its weights in place.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pctrain.tools.gpu_check import models
from pctrain.tools.gpu_check.check import Check

if TYPE_CHECKING:
    from pctrain.rollout import RolloutEngine

TIMEOUT = 120.0  # seconds of a collective
EOS = 2
PROMPTS, PROMPT, NEW = 8, 24, 32  # number of prompts, and tokens
GPU_MEMORY = 0.3  # rollout.gpu_memory
FREED = 0.8  # share of the engine's memory that sleep must give back
UPDATES = (1, 0, 1)  # seeds of the two sets of weights; the engine starts with 0


def run(check: Check) -> None:
    """Update an engine's weights back and forth; each time it must sample as a fresh engine with them does."""
    by_seed = {1: check.program("fresh", seed=1)["samples"]}
    before = _free(check)
    engine, started = _start(check, 0)
    check.measure("start of the engine", started, "s")
    check.expect("CUDA graphs, on a GPU", _graphs(engine) == check.gpu)
    if check.gpu:
        check.measure("memory of the awake engine", (before - _free(check)) / 2**30, "GiB")
    by_seed[0] = _samples(engine)  # it is fresh itself
    check.expect("two sets of weights sample differently", by_seed[0] != by_seed[1])
    for number, seed in enumerate(UPDATES[: 2 if check.quick else None], start=1):
        if check.gpu:
            _sleep(check, engine, before, number)
        update = engine.load_weights(_weights(check, seed))
        check.measure(f"weight update {number}", update.seconds, "s", note=f"{update.bytes / 1e9:.3g} GB")
        differ = sum(got != want for got, want in zip(_samples(engine), by_seed[seed], strict=True))
        name = f"weight update {number}: a fresh engine's greedy samples"
        check.expect(name, not differ, f"{differ} of {PROMPTS} differ")
    engine.close()


def fresh(check: Check, seed: int) -> dict[str, Any]:
    """Start an engine with these weights in its own process, and return its greedy samples."""
    engine, _ = _start(check, seed)
    samples = _samples(engine)
    engine.close()
    return {"samples": samples}


def _start(check: Check, seed: int) -> tuple[RolloutEngine, float]:
    from pctrain.config.tree import RolloutConfig
    from pctrain.distributed import parallel
    from pctrain.rollout import RolloutEngine

    parallel.join(TIMEOUT)  # as in a run, whose learner has its process group
    directory = _model(check, seed)
    size = _size(check)
    rollout = RolloutConfig(gpu_memory=GPU_MEMORY, kv_cache_mb=64)
    began = time.perf_counter()
    dtype = "bfloat16" if check.gpu else "float32"
    engine = RolloutEngine(directory, rollout, dtype=dtype, context=size.max_position_embeddings, eos_id=EOS)
    return engine, time.perf_counter() - began


def _size(check: Check) -> models.Size:
    return models.HUNDRED_MILLION if check.gpu else models.TINY


def _model(check: Check, seed: int) -> Path:
    return models.llama(check.folder / f"weights-{seed}", _size(check), seed)


def _weights(check: Check, seed: int) -> Iterator[tuple[str, Any]]:
    """Yield every tensor of a set of weights, in the engine's dtype, on its device."""
    import torch
    from safetensors import safe_open

    with safe_open(_model(check, seed) / "model.safetensors", framework="pt") as file:
        for name in file.keys():  # noqa: SIM118  it is no dict
            tensor = file.get_tensor(name)
            yield name, tensor.to("cuda", torch.bfloat16) if check.gpu else tensor


def _samples(engine: RolloutEngine) -> list[list[int]]:
    from pctrain.rollout import Request

    prompts = [[3 + (7 * i + 11 * j) % 320 for j in range(PROMPT)] for i in range(PROMPTS)]
    requests = [Request(prompt, seed) for seed, prompt in enumerate(prompts)]
    return [completion.token_ids for completion in engine.generate(requests, temperature=0.0, max_response=NEW)]


def _sleep(check: Check, engine: RolloutEngine, before: int, number: int) -> None:
    awake = _free(check)
    engine.sleep()
    asleep = _free(check)
    share = (asleep - awake) / (before - awake)
    check.measure(f"sleep {number}: memory given back, of the engine's", share, at_least=FREED)


def _free(check: Check) -> int:
    """Return the free bytes of the GPU, after torch gave back what it caches; 0 without a GPU."""
    import torch

    if not check.gpu:
        return 0
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    free: int = torch.cuda.mem_get_info()[0]
    return free


def _graphs(engine: RolloutEngine) -> bool:
    """Return whether vLLM captured CUDA graphs."""
    config = engine._llm.llm_engine.vllm_config
    return not config.model_config.enforce_eager and config.compilation_config.cudagraph_mode.name != "NONE"
