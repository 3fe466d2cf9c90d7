"""Process groups, seeds, and work that is shared among ranks."""

from __future__ import annotations

import datetime
import os
import random
import time
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist

from pctrain.common.device import device, on_gpu
from pctrain.config.tree import ParallelConfig
from pctrain.distributed import gpu_environment, waits
from pctrain.distributed.health import watchdog

KEEP_ALIVE_SECONDS = 2.0  # between rank 0's keep-alives to the ranks that wait for it

T = TypeVar("T")


def join(timeout: float) -> None:
    """Join the process group (from torchrun's variables, or alone), without megatron-core. Idempotent.

    `timeout` is in seconds, for one collective.
    """
    if not dist.is_initialized():
        gpu_environment.prepare()
        if on_gpu():
            torch.cuda.set_device(device())
        # A process that torchrun did not start is alone, and needs no rendezvous: no port, no address.
        alone: dict[str, Any] = {"rank": 0, "world_size": 1, "store": dist.HashStore()}
        dist.init_process_group(
            "nccl" if on_gpu() else "gloo",
            timeout=datetime.timedelta(seconds=timeout),
            **({} if "RANK" in os.environ else alone),
        )
    if world_size() > 1:
        waits.measure()


def initialize(parallel: ParallelConfig, seed: int) -> None:
    """Join the process group, build megatron-core's groups, and seed every generator. Idempotent for one layout."""
    from megatron.core import parallel_state

    join(parallel.timeout)
    virtual = parallel.virtual_pipeline if parallel.virtual_pipeline > 1 else None
    if not parallel_state.model_parallel_is_initialized():
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=parallel.tensor,
            pipeline_model_parallel_size=parallel.pipeline,
            virtual_pipeline_model_parallel_size=virtual,
            context_parallel_size=parallel.context,
            expert_model_parallel_size=parallel.expert,
            distributed_timeout_minutes=max(1, int(parallel.timeout // 60)),
        )
    layout = (
        parallel_state.get_tensor_model_parallel_world_size(),
        parallel_state.get_pipeline_model_parallel_world_size(),
        parallel_state.get_virtual_pipeline_model_parallel_world_size(),
        parallel_state.get_context_parallel_world_size(),
        parallel_state.get_expert_model_parallel_world_size(),
    )
    wanted = (parallel.tensor, parallel.pipeline, virtual, parallel.context, parallel.expert)
    if layout != wanted:
        raise RuntimeError(
            f"this process already runs tensor x pipeline x virtual stages x context x expert = {layout}, not {wanted}"
        )
    seed_all(seed)


def seed_all(seed: int) -> None:
    """Seed the generators of Python, numpy and torch."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def rank() -> int:
    """Return this process's global rank; 0 without a process group."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """Return the number of ranks; 1 without a process group."""
    return dist.get_world_size() if dist.is_initialized() else 1


def launcher() -> str:
    """Return the command that starts pctrain on as many ranks as this job has, for "next command" lines."""
    if world_size() == 1:
        return "pctrain"
    local = int(os.environ.get("LOCAL_WORLD_SIZE", world_size()))
    nodes = "--standalone" if local == world_size() else f"--nnodes {world_size() // local}"
    return f"torchrun {nodes} --nproc-per-node {local} -m pctrain"


def data_parallel() -> tuple[int, int]:
    """Return this rank's (rank, size) in the data parallel group; ranks that share a sequence have the same."""
    from megatron.core import parallel_state

    return parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()


def coordinates() -> dict[str, int]:
    """Return this rank's position in the layout: its rank in each group of more than one."""
    from megatron.core import parallel_state as state

    groups = {
        "tensor": (state.get_tensor_model_parallel_rank, state.get_tensor_model_parallel_world_size),
        "pipeline": (state.get_pipeline_model_parallel_rank, state.get_pipeline_model_parallel_world_size),
        "context": (state.get_context_parallel_rank, state.get_context_parallel_world_size),
        "expert": (state.get_expert_model_parallel_rank, state.get_expert_model_parallel_world_size),
        "data": (state.get_data_parallel_rank, state.get_data_parallel_world_size),
    }
    return {name: rank() for name, (rank, size) in groups.items() if size() > 1}


def barrier() -> None:
    """Wait for all ranks."""
    if world_size() > 1:
        dist.barrier()
    watchdog.beat()


def from_rank_zero(compute: Callable[[], T]) -> T:
    """Return the result of `compute()`, run on rank 0 only, on every rank; an exception is raised on every rank."""
    if world_size() == 1:
        result = compute()
        watchdog.beat()
        return result
    box: list = [None, None]
    if rank() == 0:
        try:
            box[0] = compute()
        except Exception as error:  # raised again below on all ranks, so that none is left waiting
            box[1] = error
    dist.broadcast_object_list(box, src=0)
    watchdog.beat()
    if box[1] is not None:
        raise box[1]
    result = box[0]
    return result


def follow_rank_zero(work: Callable[[], Iterator[T]], consume: Callable[[T], object] = lambda value: None) -> None:
    """Iterate over `work()` on rank 0 and hand each value to `consume`, while the other ranks wait.

    They may wait for longer than a collective may take: their deadline counts from rank 0's last keep-alive, so `work`
    must yield well within it. An exception is raised on every rank.
    """
    values: Iterator[T] = iter(work()) if rank() == 0 else iter(())
    has_more = True
    while has_more:
        has_more = from_rank_zero(lambda: _consume_for_a_while(values, consume))


def _consume_for_a_while(values: Iterator[T], consume: Callable[[T], object]) -> bool:
    """Consume values for KEEP_ALIVE_SECONDS; return False if they ended before."""
    began = time.monotonic()
    for value in values:
        consume(value)
        if time.monotonic() - began > KEEP_ALIVE_SECONDS:
            return True
    return False


def map_over_ranks(fn: Callable[[list[Any]], list[T]], items: list[Any]) -> list[T]:
    """Apply `fn` to `items[r::n]` on rank r of n, and return all results in order on every rank.

    `fn` maps a list to a list of equal length.
    """
    n = world_size()
    if n == 1:
        return fn(items)
    shares = gather(fn(items[rank() :: n]))
    results: list = [None] * len(items)
    for r, share in enumerate(shares):
        results[r::n] = share
    return results


def gather(value: T) -> list[T]:
    """Return every rank's `value`, by rank."""
    values: list = [value]
    if world_size() > 1:
        values = [None] * world_size()
        dist.all_gather_object(values, value)
        watchdog.beat()
    return values


def gather_row(values: list[float]) -> np.ndarray:
    """Return every rank's numbers, float64 [world, len(values)], in one collective."""
    row = torch.tensor(values, dtype=torch.float64, device=device())
    if world_size() == 1:
        alone: np.ndarray = row.numpy(force=True)[None]
        return alone
    rows = torch.empty((world_size(), len(values)), dtype=torch.float64, device=device())
    dist.all_gather_into_tensor(rows.view(-1), row)
    watchdog.beat()
    gathered: np.ndarray = rows.numpy(force=True)
    return gathered


def agree(act: Callable[[], T]) -> T:
    """Run `act()` on every rank and return this rank's result; if any rank raises, all raise, so that none waits.

    A rank raises its own error, or another rank's if its own call succeeded.
    """
    results: list[T] = []
    error: Exception | None = None
    try:
        results.append(act())
    except Exception as caught:
        error = caught
    error = error or next((other for other in gather(error) if other is not None), None)
    if error is not None:
        raise error
    return results[0]
