"""The choice between Triton kernels and plain PyTorch."""

from __future__ import annotations

import os

import torch
from torch import Tensor


def runs_triton(tensor: Tensor) -> bool:
    """Return True on a GPU, or with TRITON_INTERPRET=1 (set before Triton is imported); float64 is PyTorch's."""
    if tensor.dtype == torch.float64:
        return False
    return tensor.is_cuda or (tensor.device.type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1")
