"""Measured rates of a device and of the interconnect between ranks, for `pctrain doctor`; they take seconds."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import torch
import torch.distributed as dist

from pctrain.common.device import device
from pctrain.core.peak import fastest, peak_flops

COPY_BYTES = 256 << 20
REDUCE_BYTES = 64 << 20


def matrix_products() -> dict[str, float]:
    """Return {dtype: FLOP/s} of the fastest of a few large matrix products."""
    return {dtype: peak_flops(dtype) for dtype in ("float32", "bfloat16")}


def copy_bandwidth() -> float:
    """Return the bytes/s read and written by a copy within this device's memory."""
    source = torch.ones(COPY_BYTES, dtype=torch.uint8, device=device())
    target = torch.empty_like(source)
    return 2 * COPY_BYTES / fastest(lambda: target.copy_(source))


def all_reduce_bandwidth() -> float:
    """Return the bus bandwidth of an all-reduce over all ranks, in bytes/s.

    It is 2 (n - 1) / n times the bytes per second, as nccl-tests count it.
    """
    n = dist.get_world_size()
    values = torch.ones(REDUCE_BYTES // 4, device=device())
    return 2 * (n - 1) / n * REDUCE_BYTES / fastest(lambda: dist.all_reduce(values))


def memory_left() -> int | None:
    """Return the bytes of host memory left to this process: the machine's, or its control group's if that is less."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        left = next(int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration, ValueError):
        return None
    try:
        limit, taken = (Path(f"/sys/fs/cgroup/memory.{name}").read_text().strip() for name in ("max", "current"))
    except OSError:  # there is no control group of version 2
        return left
    return left if limit == "max" else min(left, int(limit) - int(taken))


def shared_memory_left() -> int | None:
    """Return the free bytes of /dev/shm, or None if there is none."""
    return shutil.disk_usage("/dev/shm").free if os.path.isdir("/dev/shm") else None
