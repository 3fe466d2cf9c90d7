"""Process groups and seeds, and work shared out over ranks."""

from __future__ import annotations

import datetime
import os
import random
import time
from collections.abc import Callable, Iterator

import numpy as np
import torch
import torch.distributed as dist

from pctrain.common.device import device, on_gpu
from pctrain.config.tree import ParallelConfig
from pctrain.core.patches import cpu as cpu_patches
from pctrain.distributed import waits
from pctrain.distributed.health import watchdog

SIGN_OF_LIFE = 2.0  # seconds between two words of rank 0 to those that wait for it


def join(timeout: float) -> None:
    """Joins the process group (from torchrun's variables, or alone), without megatron-core. Idempotent. timeout: s, of a collective."""
    if not dist.is_initialized():
        if on_gpu():
            torch.cuda.set_device(device())
        # A process that torchrun did not start is alone, and needs no rendezvous: no port, no address.
        alone = {} if "RANK" in os.environ else {"rank": 0, "world_size": 1, "store": dist.HashStore()}
        dist.init_process_group("nccl" if on_gpu() else "gloo", timeout=datetime.timedelta(seconds=timeout), **alone)
    if world_size() > 1:
        waits.measure()


def initialize(parallel: ParallelConfig, seed: int) -> None:
    """Joins the process group and builds megatron-core's groups. Idempotent for one layout."""
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

    cpu_patches.install()
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
    model_parallel_cuda_manual_seed(seed, force_reset_rng=True)


def seed_all(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def launcher() -> str:
    """How a command of pctrain is started on as many ranks as this job has, for "next command" lines."""
    if world_size() == 1:
        return "pctrain"
    local = int(os.environ.get("LOCAL_WORLD_SIZE", world_size()))
    where = "--standalone" if local == world_size() else f"--nnodes {world_size() // local}"
    return f"torchrun {where} --nproc-per-node {local} -m pctrain"


def data_parallel() -> tuple[int, int]:
    """(rank, size) in the data parallel group; ranks that share a sequence (context parallel) have the same."""
    from megatron.core import parallel_state

    return parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()


def coordinates() -> dict[str, int]:
    """Where this rank stands in the layout: its rank in each group of several."""
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
    if world_size() > 1:
        dist.barrier()
    watchdog.beat()


def from_rank_zero(compute: Callable):
    """`compute()` on rank 0 alone, its result on every rank; an exception there is raised on every rank."""
    if world_size() == 1:
        result = compute()
        watchdog.beat()
        return result
    box: list = [None, None]
    if rank() == 0:
        try:
            box[0] = compute()
        except Exception as error:  # re-raised below, on all ranks together: nobody is left waiting
            box[1] = error
    dist.broadcast_object_list(box, src=0)
    watchdog.beat()
    if box[1] is not None:
        raise box[1]
    return box[0]


def follow_rank_zero(work: Callable[[], Iterator], seen: Callable = lambda value: None) -> None:
    """Iterates over `work()` on rank 0, which hands each value to `seen`; the others wait, for longer than a collective may take.

    Their deadline counts from rank 0's last sign of life, so `work` must yield well within it. An exception is raised on every rank.
    """
    values = iter(work()) if rank() == 0 else None
    going = True
    while going:
        going = from_rank_zero(lambda: _for_a_while(values, seen))


def _for_a_while(values: Iterator, seen: Callable) -> bool:
    """Whether there is more to come after SIGN_OF_LIFE seconds."""
    began = time.monotonic()
    for value in values:
        seen(value)
        if time.monotonic() - began > SIGN_OF_LIFE:
            return True
    return False


def map_over_ranks(fn: Callable[[list], list], items: list) -> list:
    """Rank r of n applies `fn` (a list to a list of equal length) to `items[r::n]`; every rank gets all results, in order."""
    n = world_size()
    if n == 1:
        return fn(items)
    shares = gather(fn(items[rank() :: n]))
    results: list = [None] * len(items)
    for r, share in enumerate(shares):
        results[r::n] = share
    return results


def gather(value) -> list:
    """Every rank's `value`, by rank."""
    values: list = [value]
    if world_size() > 1:
        values = [None] * world_size()
        dist.all_gather_object(values, value)
        watchdog.beat()
    return values


def gather_row(values: list[float]) -> np.ndarray:
    """float64 [world, len(values)]: every rank's numbers, in one collective."""
    row = torch.tensor(values, dtype=torch.float64, device=device())
    if world_size() == 1:
        return row.numpy(force=True)[None]
    rows = torch.empty((world_size(), len(values)), dtype=torch.float64, device=device())
    dist.all_gather_into_tensor(rows.view(-1), row)
    watchdog.beat()
    return rows.numpy(force=True)


def agree(act: Callable):
    """Runs `act()` on every rank; where it raised on any, every rank raises (its own error, or another's): nobody is left waiting."""
    result = error = None
    try:
        result = act()
    except Exception as caught:
        error = caught
    error = error or next((e for e in gather(error) if e is not None), None)
    if error is not None:
        raise error
    return result
