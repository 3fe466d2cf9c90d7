"""How vLLM is started inside the learner's process, and what is done so that the learner does not notice.

vLLM behaves as the owner of its process: it reseeds the generators, replaces `torch.set_num_threads`, rewrites environment variables
(LOCAL_WORLD_SIZE, LD_PRELOAD, ...), and on shutdown destroys torch.distributed's default group. Every call into it goes through
`guest()`, which puts all of that back.
"""

from __future__ import annotations

import gc
import logging
import os
import random
import uuid
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.distributed as dist

from pctrain.common.device import on_gpu
from pctrain.common.errors import UserError
from pctrain.config.tree import RolloutConfig
from pctrain.distributed.health import watchdog
from pctrain.hf.config import HFConfig
from pctrain.rollout.sharing import EngineGroups

if TYPE_CHECKING:
    from vllm import LLM

# Tokens of one forward pass on CPU: room for the prompts of a whole batch at once (256 prompts of 64 tokens).
CPU_BATCHED_TOKENS = 16384

_running = 0  # engines in this process; they share vLLM's process groups
_vllm_made_the_world = False  # torch.distributed was not initialised before the first engine


def start_llm(hf_dir: Path, rollout: RolloutConfig, groups: EngineGroups, *, dtype: str, context: int) -> LLM:
    """A vLLM engine with the weights of `hf_dir`. Collective. UserError where vLLM refuses the model or the sizes."""
    global _running, _vllm_made_the_world
    if _running == 0:
        _vllm_made_the_world = not dist.is_initialized()
    with guest(groups, starting=True):
        from vllm import LLM

        _keep_the_learners_groups()
        if not on_gpu():
            _check_head_size(hf_dir)
        try:
            with _private_shared_memory(groups):
                llm = LLM(**engine_options(hf_dir, rollout, groups, dtype=dtype, context=context))
        except ValueError as error:  # pydantic's ValidationError is one
            raise UserError(
                f"vLLM refuses {hf_dir} with context {context} (the model's, or rollout.max_prompt and the longest "
                f"response), rollout.kv_cache_mb={rollout.kv_cache_mb}, "
                f"rollout.max_sequences={rollout.max_sequences}, rollout.gpu_memory={rollout.gpu_memory}: {error}"
            ) from error
    _running += 1
    step = llm.llm_engine.step

    def living_step():
        watchdog.beat()
        return step()

    llm.llm_engine.step = living_step
    return llm


def stop_llm(llm: LLM, groups: EngineGroups) -> None:
    """Shuts an engine down; with the last one, vLLM's own process groups go too. The learner's stay."""
    global _running
    with guest(groups):
        llm.llm_engine.engine_core.shutdown()
        _running -= 1
        if _running == 0:
            _destroy_vllms_groups()
    gc.collect()
    if on_gpu():
        torch.cuda.empty_cache()


def engine_options(hf_dir: Path, rollout: RolloutConfig, groups: EngineGroups, *, dtype: str, context: int) -> dict:
    """Arguments of `vllm.LLM`."""
    options = dict(
        model=str(hf_dir),
        dtype=dtype,
        tensor_parallel_size=rollout.tensor,
        max_model_len=context,
        max_num_seqs=rollout.max_sequences,
        seed=0,  # every request brings its own
        skip_tokenizer_init=True,
        generation_config="vllm",  # not the model's generation_config.json: its top_p, penalties and stop tokens are not the policy's
        logprobs_mode="processed_logprobs",  # after the temperature, as the learner defines them
        disable_log_stats=True,
        use_tqdm_on_load=False,
    )
    if groups.world > 1:
        # One engine a rank (or a group of ranks) inside the learner's world. Not "uni" even for tensor=1:
        # that would take GPU 0 on every rank.
        options["distributed_executor_backend"] = "external_launcher"
    if on_gpu():
        options.update(gpu_memory_utilization=rollout.gpu_memory, enable_sleep_mode=True)
    else:
        # A prompt prefilled in pieces rewinds the request's generator, which CPU generators cannot do: whole prompts only.
        options.update(
            enforce_eager=True,
            kv_cache_memory_bytes=rollout.kv_cache_mb << 20,
            enable_chunked_prefill=False,
            max_num_batched_tokens=max(context, CPU_BATCHED_TOKENS),
        )
    return options


@contextmanager
def guest(groups: EngineGroups, *, starting: bool = False) -> Iterator[None]:
    """Around every call into vLLM: gives it the environment it needs, and afterwards restores the learner's process state.

    Restored: os.environ, the generators of Python, NumPy and torch (the current GPU's too), `torch.set_num_threads` and the number of
    threads, float32 matmul precision, default dtype.
    """
    environment = dict(os.environ)
    generators = (
        random.getstate(),
        np.random.get_state(),
        torch.get_rng_state(),
        torch.cuda.get_rng_state() if on_gpu() else None,
    )
    set_num_threads, threads = torch.set_num_threads, torch.get_num_threads()
    precision, default_dtype = torch.get_float32_matmul_precision(), torch.get_default_dtype()
    os.environ.update(_environment(groups))
    try:
        with _quiet_start() if starting else nullcontext():
            yield
    finally:
        for name in os.environ.keys() - environment.keys():
            del os.environ[name]
        os.environ.update(environment)
        random.setstate(generators[0])
        np.random.set_state(generators[1])
        torch.set_rng_state(generators[2])
        if generators[3] is not None:
            torch.cuda.set_rng_state(generators[3])
        torch.set_num_threads = set_num_threads
        if torch.get_num_threads() != threads:
            torch.set_num_threads(threads)
        torch.set_float32_matmul_precision(precision)
        torch.set_default_dtype(default_dtype)


def _environment(groups: EngineGroups) -> dict[str, str]:
    environment = {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the engine lives in this process: that is what makes the swap a copy
        "VLLM_NO_USAGE_STATS": "1",  # no report to vLLM's server
        "RANK": str(groups.rank),  # what external_launcher reads; the learner may have been started without torchrun
        "LOCAL_RANK": os.environ.get("LOCAL_RANK", str(torch.cuda.current_device() if on_gpu() else groups.rank)),
    }
    if not on_gpu():
        environment["TORCHDYNAMO_DISABLE"] = "1"  # compiling a helper of the sampler takes 17 s and saves nothing here
    return environment


@contextmanager
def _quiet_start() -> Iterator[None]:
    """Shows only errors: vLLM's start-up warnings concern choices made here on purpose (eager mode, no tokenizer, no preloaded allocator).

    Afterwards warnings are. A VLLM_LOGGING_LEVEL in the environment is obeyed instead.
    """
    if "VLLM_LOGGING_LEVEL" in os.environ:
        yield
        return
    logger = logging.getLogger("vllm")
    os.environ["VLLM_LOGGING_LEVEL"] = "ERROR"
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(logging.WARNING)
        logging.getLogger("vllm.renderers").setLevel(
            logging.ERROR
        )  # it would warn of the missing tokenizer at the first request


def _keep_the_learners_groups() -> None:
    """vLLM ends an engine (also at garbage collection and at exit) by destroying all of torch.distributed: not here."""
    import vllm.v1.engine.core as engine_core

    engine_core.cleanup_dist_env_and_memory = lambda *args, **kwargs: None


def _check_head_size(hf_dir: Path) -> None:
    """vLLM's CPU attention takes some head sizes only, and says so in the first forward pass, half-way through a batch."""
    from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend

    size = HFConfig.read(hf_dir).head_dim
    sizes = CPUAttentionBackend.get_supported_head_sizes()
    if size not in sizes:
        raise UserError(
            f"{hf_dir}: the model's attention heads are {size} wide; vLLM on CPU supports {', '.join(map(str, sizes))}: "
            "choose model.architecture.hidden / heads accordingly"
        )


@contextmanager
def _private_shared_memory(groups: EngineGroups) -> Iterator[None]:
    """Names the shared memory of tensor parallel CPU ranks after this very start, and unlinks it as soon as all ranks have mapped it.

    Under external_launcher vLLM gives it the same name in every job of the machine and never unlinks it: a second job, or a restart after
    a SIGKILL, fails with "create shm in SHMManager failed". A mapping outlives its name, so a killed run now leaves nothing behind.
    """
    if on_gpu() or groups.tensor == 1:
        yield
        return
    from vllm.distributed.device_communicators.cpu_communicator import _CPUSHMDistributed

    token = [f"pctrain-{uuid.uuid4().hex}"]
    dist.broadcast_object_list(token, src=0)
    vllms_name = _CPUSHMDistributed.make_group_name
    _CPUSHMDistributed.make_group_name = staticmethod(
        lambda communicator: token[0] + vllms_name(communicator).replace("/", "")
    )
    try:
        yield  # every rank is past its mapping when this returns: LLM() reduces the KV-cache size over all ranks after it
    finally:
        _CPUSHMDistributed.make_group_name = staticmethod(vllms_name)
        for file in Path("/dev/shm").glob(f"{token[0]}*"):
            file.unlink(missing_ok=True)  # the other ranks do the same


def _destroy_vllms_groups() -> None:
    """`cleanup_dist_env_and_memory` without the learner's default group, unless vLLM itself made it."""
    from vllm.distributed import parallel_state

    parallel_state.destroy_model_parallel()
    if parallel_state._WORLD is not None:
        parallel_state._WORLD.destroy()
    parallel_state._WORLD = parallel_state._NODE_COUNT = None
    if _vllm_made_the_world and dist.is_initialized():
        dist.destroy_process_group()
