"""Exchange of findings between the ranks, and rates measured on every rank and between the ranks."""

from __future__ import annotations

import datetime
import itertools
import os
import pickle
from typing import TypeVar

from pctrain.tools.doctor.findings import Finding

EXCHANGE_SECONDS = 900.0  # ranks import packages before they meet, from a shared disk maybe

T = TypeVar("T")
_rounds = itertools.count()


def exchange(value: T) -> list[T]:
    """Return every rank's `value`, by rank. Collective.

    It goes through the store that ranks meet in, and so works where NCCL does not.
    """
    import torch.distributed as dist

    from pctrain.distributed import parallel

    if dist.is_initialized() or "RANK" not in os.environ:
        return parallel.gather(value)
    timeout = datetime.timedelta(seconds=EXCHANGE_SECONDS)
    store, rank, world = next(iter(dist.rendezvous("env://", timeout=timeout)))
    # torchrun may keep the store when it restarts the ranks
    store = dist.PrefixStore(f"doctor/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}/{next(_rounds)}", store)
    store.set(f"value/{rank}", pickle.dumps(value))
    values = [pickle.loads(store.get(f"value/{other}")) for other in range(world)]
    store.set(f"done/{rank}", b"")
    if rank == 0:  # may host the store, and must not end before the others have read it
        store.wait([f"done/{other}" for other in range(world)], timeout)
    return values


def measured() -> list[Finding]:
    """Measure matrix products and copies on this rank's device."""
    from pctrain.common.device import on_gpu
    from pctrain.tools.doctor import measures

    findings = [
        Finding(f"matrix product, {dtype}", f"{rate / 1e12:.3g} TFLOP/s")
        for dtype, rate in measures.matrix_products().items()
    ]
    where = "gpu" if on_gpu() else "cpu"
    return [*findings, Finding(f"copy in {where} memory", f"{measures.copy_bandwidth() / 1e9:.3g} GB/s")]


def between_ranks() -> list[Finding]:
    """Measure the interconnect between the ranks. Collective."""
    import torch

    from pctrain.common.device import on_gpu
    from pctrain.distributed import parallel
    from pctrain.tools.doctor import measures

    if parallel.world_size() == 1:
        return []
    name = f"NCCL {'.'.join(map(str, torch.cuda.nccl.version()))}" if on_gpu() else "gloo"
    rate = measures.all_reduce_bandwidth() / 1e9
    return [Finding(f"all-reduce over {parallel.world_size()} ranks", f"{rate:.3g} GB/s ({name})")]
