"""How fast this device multiplies matrices: what model FLOPs utilisation is a share of."""

from __future__ import annotations

import time

import torch

from pctrain.core.model import DTYPES
from pctrain.device import device, on_gpu

_TURNS = 6


def peak_flops(dtype: str) -> float:
    """FLOP/s of the fastest of a few large matrix products, in `model.dtype`. Takes about 0.1 s.

    Measured, not read off a data sheet: a data sheet's figure holds at a clock rate that a machine under its power limit does not reach,
    and CPUs have none.
    """
    n = 8192 if on_gpu() else 768
    own = torch.Generator(device()).manual_seed(0)  # the run's own random numbers stay as they are
    a, b = (torch.randn(n, n, device=device(), generator=own).to(DTYPES[dtype]) for _ in range(2))
    fastest = 0.0
    for _ in range(_TURNS):
        _wait()
        began = time.perf_counter()
        torch.mm(a, b)
        _wait()
        fastest = max(fastest, 2 * n**3 / (time.perf_counter() - began))
    return fastest


def _wait() -> None:
    if on_gpu():
        torch.cuda.synchronize()
