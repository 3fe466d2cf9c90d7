"""The speed at which this device multiplies matrices: the rate that model FLOPs utilization (MFU) is a share of."""

from __future__ import annotations

import math
import time
from collections.abc import Callable

import torch

from pctrain.common.device import DTYPES, device, on_gpu

_REPEATS = 6


def peak_flops(dtype: str) -> float:
    """Measure the FLOP/s of a large matrix product in `model.dtype`, the fastest of a few. It takes about 0.1 s.

    The rate is measured and not taken from a data sheet: a data sheet assumes a clock rate that a machine at its power
    limit does not reach, and CPUs have no such figure.
    """
    n = 8192 if on_gpu() else 768
    generator = torch.Generator(device()).manual_seed(0)  # leaves the run's own random numbers as they are
    a, b = (torch.randn(n, n, device=device(), generator=generator).to(DTYPES[dtype]) for _ in range(2))
    return 2 * n**3 / fastest(lambda: torch.mm(a, b))


def fastest(act: Callable[[], object]) -> float:
    """Return the wall-clock seconds of the fastest of a few calls, including the work they start on the device."""
    seconds = math.inf
    for _ in range(_REPEATS):
        _synchronize()
        began = time.perf_counter()
        act()
        _synchronize()
        seconds = min(seconds, time.perf_counter() - began)
    return seconds


def _synchronize() -> None:
    """Wait until the device has finished all work."""
    if on_gpu():
        torch.cuda.synchronize()
