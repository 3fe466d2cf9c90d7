"""How fast this device multiplies matrices: what model FLOPs utilisation is a share of."""

from __future__ import annotations

import math
import time
from collections.abc import Callable

import torch

from pctrain.common.device import DTYPES, device, on_gpu

_TURNS = 6


def peak_flops(dtype: str) -> float:
    """FLOP/s of the fastest of a few large matrix products, in `model.dtype`. Takes about 0.1 s.

    Measured, not read off a data sheet: a data sheet's figure holds at a clock rate that a machine under its power limit does not reach,
    and CPUs have none.
    """
    n = 8192 if on_gpu() else 768
    own = torch.Generator(device()).manual_seed(0)  # the run's own random numbers stay as they are
    a, b = (torch.randn(n, n, device=device(), generator=own).to(DTYPES[dtype]) for _ in range(2))
    return 2 * n**3 / fastest(lambda: torch.mm(a, b))


def fastest(act: Callable[[], object]) -> float:
    """Wall-clock seconds of the fastest of a few calls, to the end of what they started on the device."""
    seconds = math.inf
    for _ in range(_TURNS):
        _wait()
        began = time.perf_counter()
        act()
        _wait()
        seconds = min(seconds, time.perf_counter() - began)
    return seconds


def _wait() -> None:
    if on_gpu():
        torch.cuda.synchronize()
