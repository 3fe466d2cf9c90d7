"""Where the Triton kernels run, and where plain PyTorch does."""

from __future__ import annotations

import os

import torch
from torch import Tensor


def runs_triton(tensor: Tensor) -> bool:
    """True on a GPU, and with TRITON_INTERPRET=1 (set before Triton is imported) on a CPU too; float64 is always PyTorch's."""
    return tensor.dtype != torch.float64 and (
        tensor.is_cuda or tensor.device.type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1"
    )
