"""Matrix products of half or full precision operands with a full precision result.

On a GPU they are cuBLAS's, which accepts any row stride: the half precision gradient in the memory of fp32 logits needs
no copy.
"""

from __future__ import annotations

import torch
from torch import Tensor

HALF = (torch.bfloat16, torch.float16)


def math_dtype(tensor: Tensor) -> torch.dtype:
    """Return the dtype of logits, softmax and losses: float64 for float64 inputs, else fp32."""
    return torch.promote_types(tensor.dtype, torch.float32)


def operand(tensor: Tensor) -> Tensor:
    """Return the tensor as the products below take it: unchanged, except that half precision on a CPU becomes fp32.

    PyTorch's CPU product of half precision matrices rounds its result to half precision; CUDA's can return fp32.
    """
    return tensor.float() if tensor.dtype in HALF and not tensor.is_cuda else tensor


def product(a: Tensor, b: Tensor, out: Tensor) -> Tensor:
    """Compute out = a @ b; `out` is full precision."""
    if a.dtype in HALF:
        return torch.mm(a, b, out_dtype=out.dtype, out=out)
    return torch.mm(a, b, out=out)


def add_product(accumulator: Tensor, a: Tensor, b: Tensor) -> None:
    """Compute accumulator += a @ b; `accumulator` is full precision."""
    if a.dtype in HALF:  # an fp32 accumulator: torch 2.10 and later (pytorch/pytorch#167931)
        torch.addmm(accumulator, a, b, out_dtype=accumulator.dtype, out=accumulator)
    else:
        accumulator.addmm_(a, b)
