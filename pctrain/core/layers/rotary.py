"""Rotary position embedding of the torch specs, where queries and keys are about to attend."""

from __future__ import annotations

import torch
from torch.autograd.function import once_differentiable


def rotation(angles: torch.Tensor, heads: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """angles [longest, 1, 1, dim] -> cos and signed sin [longest, heads, dim].

    Spread over the heads, so that multiplying [..., length, heads, dim] runs over long rows of memory.
    """
    angles = angles.detach().view(len(angles), 1, -1)
    cos, sin = angles.cos(), angles.sin()
    half = angles.shape[-1] // 2
    sin = torch.cat((-sin[..., :half], sin[..., half:]), -1)
    return tuple(x.to(dtype).expand(-1, heads, -1).contiguous() for x in (cos, sin))


class Rotate(torch.autograd.Function):
    """x [..., length, heads, dim] turned by the angle of its place: x cos + (halves of x exchanged) * signed sin.

    cos and sin [at least length, heads, dim].
    """

    @staticmethod
    def forward(ctx, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(cos, sin)
        return _rotate(x, cos, sin, 1.0)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: torch.Tensor):
        return _rotate(grad, *ctx.saved_tensors, -1.0), None, None  # a rotation's transpose turns back


def _rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, direction: float) -> torch.Tensor:
    length, half = x.shape[-3], x.shape[-1] // 2
    exchanged = torch.cat((x[..., half:], x[..., :half]), -1)
    return torch.addcmul(x * cos[:length], exchanged, sin[:length], value=direction)
