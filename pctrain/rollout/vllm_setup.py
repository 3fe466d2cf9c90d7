"""Starting and stopping vLLM inside the learner's process, without the learner noticing.

vLLM behaves as the owner of its process: it reseeds the generators, replaces `torch.set_num_threads`, rewrites
environment variables (LOCAL_WORLD_SIZE, LD_PRELOAD, ...), and on shutdown destroys torch.distributed's default group.
Every call into it goes through `guest()`, which restores all of that.
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
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.distributed as dist

from pctrain.common.device import on_gpu
from pctrain.common.errors import UserError
from pctrain.config.tree import RolloutConfig
from pctrain.distributed import gpu_environment
from pctrain.distributed.health import watchdog
from pctrain.hf.config import HFConfig
from pctrain.rollout.sharing import EngineGroups

if TYPE_CHECKING:  # importing vLLM takes seconds
    from vllm import LLM

# Tokens of one forward pass on CPU: room for the prompts of a whole batch at once (256 prompts of 64 tokens).
CPU_BATCHED_TOKENS = 16384

_running = 0  # engines in this process; they share vLLM's process groups
_vllm_made_the_world = False  # torch.distributed was not initialised before the first engine


def start_llm(hf_dir: Path, rollout: RolloutConfig, groups: EngineGroups, *, dtype: str, context: int) -> LLM:
    """Start a vLLM engine with the weights of `hf_dir`. Collective. UserError if vLLM refuses the model or sizes."""
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

    def step_with_beat() -> Any:
        watchdog.beat()
        return step()

    llm.llm_engine.step = step_with_beat
    return llm


def stop_llm(llm: LLM, groups: EngineGroups) -> None:
    """Shut an engine down, and with the last one vLLM's own process groups. The learner's groups stay."""
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
    """Return the arguments of `vllm.LLM`."""
    options: dict[str, Any] = {
        "model": str(hf_dir),
        "dtype": dtype,
        "tensor_parallel_size": rollout.tensor,
        "max_model_len": context,
        "max_num_seqs": rollout.max_sequences,
        "seed": 0,  # every request has its own
        "skip_tokenizer_init": True,
        # Not the model's generation_config.json: its top_p, penalties and stop tokens are not the policy's.
        "generation_config": "vllm",
        "logprobs_mode": "processed_logprobs",  # after the temperature, as the learner defines them
        "disable_log_stats": True,
        "use_tqdm_on_load": False,
    }
    if groups.world > 1:
        # One engine per rank (or group of ranks) inside the learner's world. Not "uni" even for tensor=1: it would
        # take GPU 0 on every rank.
        options["distributed_executor_backend"] = "external_launcher"
    if on_gpu():
        options.update(gpu_memory_utilization=rollout.gpu_memory, enable_sleep_mode=True)
        # vLLM's own all-reduce shares the memory of its CUDA graphs over CUDA IPC, which takes no expandable segments:
        # the process would exit.
        options["disable_custom_all_reduce"] = gpu_environment.expandable_segments()
    else:
        # Whole prompts only: a prompt prefilled in pieces rewinds the request's generator, and CPU generators cannot.
        options.update(
            enforce_eager=True,
            kv_cache_memory_bytes=rollout.kv_cache_mb << 20,
            enable_chunked_prefill=False,
            max_num_batched_tokens=max(context, CPU_BATCHED_TOKENS),
        )
    return options


@contextmanager
def guest(groups: EngineGroups, *, starting: bool = False) -> Iterator[None]:
    """Give vLLM the environment it needs for a call, and afterwards restore the learner's process state.

    Restored are os.environ, the generators of Python, NumPy and torch (the current GPU's too), `torch.set_num_threads`
    and the number of threads, the float32 matmul precision and the default dtype.
    """
    environment = dict(os.environ)
    generators = (
        random.getstate(),
        np.random.get_state(),
        torch.get_rng_state(),
        torch.cuda.get_rng_state() if on_gpu() else None,
    )
    set_num_threads = torch.set_num_threads
    threads = torch.get_num_threads()
    precision = torch.get_float32_matmul_precision()
    default_dtype = torch.get_default_dtype()
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
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # an engine in this process makes the weight update a copy
        "VLLM_NO_USAGE_STATS": "1",  # no report to vLLM's server
        "RANK": str(groups.rank),  # what external_launcher reads; the learner may have been started without torchrun
        "LOCAL_RANK": os.environ.get("LOCAL_RANK", str(torch.cuda.current_device() if on_gpu() else groups.rank)),
    }
    if not on_gpu():
        environment["TORCHDYNAMO_DISABLE"] = "1"  # compiling a helper of the sampler takes 17 s and saves nothing here
    return environment


@contextmanager
def _quiet_start() -> Iterator[None]:
    """Show only errors while vLLM starts, and warnings afterwards.

    Its start-up warnings concern choices made here on purpose (eager mode, no tokenizer, no preloaded allocator). A
    VLLM_LOGGING_LEVEL in the environment is obeyed instead.
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
        # It would warn about the missing tokenizer at the first request.
        logging.getLogger("vllm.renderers").setLevel(logging.ERROR)


def _keep_the_learners_groups() -> None:
    """Keep vLLM from destroying all of torch.distributed when an engine ends, is garbage-collected, or at exit."""
    import vllm.v1.engine.core as engine_core

    engine_core.cleanup_dist_env_and_memory = lambda *args, **kwargs: None


def _check_head_size(hf_dir: Path) -> None:
    """Refuse a head size that vLLM's CPU attention cannot take; vLLM would fail midway through the first batch."""
    from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend

    size = HFConfig.read(hf_dir).head_dim
    sizes = CPUAttentionBackend.get_supported_head_sizes()
    if size not in sizes:
        raise UserError(
            f"{hf_dir}: the model's attention heads are {size} wide; vLLM on CPU supports "
            f"{', '.join(map(str, sizes))}. Choose model.architecture.hidden / heads accordingly"
        )


@contextmanager
def _private_shared_memory(groups: EngineGroups) -> Iterator[None]:
    """Give the shared memory of tensor parallel CPU ranks a unique name, and unlink it once all ranks have mapped it.

    Under external_launcher vLLM gives it the same name in every job of the machine and never unlinks it: a second job,
    or a restart after a SIGKILL, fails with "create shm in SHMManager failed". A mapping outlives its name, so a killed
    run leaves nothing behind.
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
        # When this returns, every rank has mapped the memory: LLM() reduces the KV-cache size over all ranks after it.
        yield
    finally:
        _CPUSHMDistributed.make_group_name = staticmethod(vllms_name)
        for file in Path("/dev/shm").glob(f"{token[0]}*"):
            file.unlink(missing_ok=True)  # the other ranks do the same


def _destroy_vllms_groups() -> None:
    """Do what `cleanup_dist_env_and_memory` does, except for the default group, unless vLLM itself made that."""
    from vllm.distributed import parallel_state

    parallel_state.destroy_model_parallel()
    if parallel_state._WORLD is not None:
        parallel_state._WORLD.destroy()
    parallel_state._WORLD = parallel_state._NODE_COUNT = None
    if _vllm_made_the_world and dist.is_initialized():
        dist.destroy_process_group()
