"""The only check of the device, which everything that differs between CPU and GPU asks, and the dtypes of a model."""

from __future__ import annotations

import os
from collections.abc import Sequence

import torch

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}  # model.dtype


def on_gpu() -> bool:
    """Return whether this job runs on CUDA devices."""
    return torch.cuda.is_available()


def device() -> torch.device:
    """Return the device of this rank: its GPU, or the CPU."""
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if on_gpu() else torch.device("cpu")


_ALIGNMENT = 16  # bytes; views of a buffer need that of their dtype, and vectorized reads this


def to_device(tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Return host tensors on this rank's device, all of them by one copy that the host does not wait for.

    On a GPU they are views of one buffer. The copy reads pinned memory, which torch's host allocator keeps until the
    copy has ended. (A copy from pageable memory would wait for all earlier work on the stream.)
    """
    if not on_gpu():
        return list(tensors)
    offsets, size = [], 0
    for tensor in tensors:
        offsets.append(size)
        size += -(-tensor.nbytes // _ALIGNMENT) * _ALIGNMENT
    host = torch.empty(size, dtype=torch.uint8, pin_memory=True)
    for tensor, offset in zip(tensors, offsets, strict=True):
        _view(host, offset, tensor).copy_(tensor)
    buffer = host.to(device(), non_blocking=True)
    return [_view(buffer, offset, tensor) for tensor, offset in zip(tensors, offsets, strict=True)]


def _view(buffer: torch.Tensor, offset: int, like: torch.Tensor) -> torch.Tensor:
    """Return the bytes of `buffer` from `offset` on with the dtype and shape of `like`."""
    return buffer[offset : offset + like.nbytes].view(like.dtype).view(like.shape)
