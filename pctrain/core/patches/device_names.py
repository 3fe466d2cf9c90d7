"""Lets megatron-core run where there is no CUDA: its literal CUDA device names mean the CPU.

megatron-core spells the device `torch.cuda.current_device()` or `"cuda"`. The patch changes no arithmetic, only device
names and synchronization calls that have nothing to wait for on a CPU.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._device import _device_constructors

from pctrain.core.patches.patch import Patch, without_gpu

# Factories that megatron-core calls with device="cuda" or device=torch.cuda.current_device().
FACTORIES = ("tensor", "empty", "zeros", "ones", "full", "arange", "empty_like", "zeros_like", "ones_like")


class _DeviceBlindTypeName(str):
    """A tensor type name that also equals its CUDA spelling."""

    __slots__ = ()
    __hash__ = str.__hash__

    def __eq__(self, other: object) -> bool:
        return isinstance(other, str) and str.replace(self, ".cuda", "") == str.replace(other, ".cuda", "")

    def __ne__(self, other: object) -> bool:
        return not self == other


def _map_cuda_to_cpu(factory: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    @functools.wraps(factory)
    def wrapper(*args: Any, **kwargs: Any) -> torch.Tensor:
        device = kwargs.get("device")
        if device is not None and not isinstance(device, int) and str(device).split(":")[0] == "cuda":
            kwargs["device"] = "cpu"
            kwargs.pop("pin_memory", None)
        return factory(*args, **kwargs)

    return wrapper


def _apply() -> None:
    torch.cuda.current_device = lambda: "cpu"  # megatron-core only ever passes it on as device=...
    torch.cuda.set_device = lambda device: None
    torch.cuda.synchronize = lambda device=None: None
    torch.cuda.current_stream = lambda device=None: None
    # `with torch.device(...)` recognizes factories by identity in a cached set. Fill the cache before the factories are
    # wrapped, or loading a transformers model on the meta device silently leaves garbage in its rotary buffers.
    _device_constructors()
    for name in FACTORIES:
        setattr(torch, name, _map_cuda_to_cpu(getattr(torch, name)))
    torch.Tensor.cuda = lambda self, *args, **kwargs: self
    real_type = torch.Tensor.type

    def device_blind_type(self: torch.Tensor, dtype: Any = None, *args: Any, **kwargs: Any) -> Any:
        if dtype is None:
            return _DeviceBlindTypeName(real_type(self))
        return real_type(self, dtype, *args, **kwargs)

    # megatron-core chooses buckets by comparing tensor.type() with "torch.cuda.FloatTensor".
    torch.Tensor.type = device_blind_type


PATCH = Patch(
    package="megatron-core",
    version="0.16.1",
    reason="its buffers and optimizers name CUDA devices literally, also on a machine without CUDA",
    test="tests/core/test_layouts.py::test_losses_gradient_norms_and_weights_equal_those_of_one_process",
    apply=_apply,
    is_needed=without_gpu,
)
