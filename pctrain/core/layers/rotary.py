"""Rotary position embedding of the torch specs, applied to queries and keys inside their attention."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from torch.autograd.function import FunctionCtx, once_differentiable


@dataclass
class RotatedLayout(PackedSeqParams):
    """A pack whose attention rotates queries and keys by the position of each token.

    `qkv_format` must not be "thd": megatron-core would then rotate, and would split the pack or take the cosine of
    every token's angles in every layer, for queries and for keys.
    """

    positions: torch.Tensor = None  # int64 [T], from 0 in every sequence
    angles: torch.Tensor = None  # [longest, 1, 1, dim], set in the forward pass
    _tables: dict[tuple[int, torch.dtype], tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict)

    def cos_sin(self, heads: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """Return cos and signed sin [T, heads, dim], computed once per pack and not in every layer."""
        key = (heads, dtype)
        if key not in self._tables:
            cos, sin = rotation(self.angles, heads, dtype)
            self._tables[key] = cos.index_select(0, self.positions), sin.index_select(0, self.positions)
        return self._tables[key]

    def rotate(self, x: torch.Tensor) -> torch.Tensor:
        """Rotate x [T, heads, dim] by the positions of its tokens."""
        rotated: torch.Tensor = Rotate.apply(x, *self.cos_sin(x.shape[1], x.dtype))
        return rotated


def rotation(angles: torch.Tensor, heads: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Return cos and signed sin [longest, heads, dim] of angles [longest, 1, 1, dim].

    They are spread over the heads, so that multiplying [..., length, heads, dim] runs over long rows of memory.
    """
    angles = angles.detach().view(len(angles), 1, -1)
    cos, sin = angles.cos(), angles.sin()
    half = angles.shape[-1] // 2
    sin = torch.cat((-sin[..., :half], sin[..., half:]), -1)
    return cos.to(dtype).expand(-1, heads, -1).contiguous(), sin.to(dtype).expand(-1, heads, -1).contiguous()


class Rotate(torch.autograd.Function):
    """Rotation of x [..., length, heads, dim] by position: x cos + (halves of x exchanged) * signed sin.

    cos and sin are [at least length, heads, dim].
    """

    @staticmethod
    def forward(ctx: FunctionCtx, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        """Return x rotated by its angles."""
        ctx.save_for_backward(cos, sin)
        return _rotate(x, cos, sin, 1.0)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        """Return the gradient of x: the transpose of a rotation is the rotation back."""
        cos, sin = ctx.saved_tensors
        return _rotate(grad, cos, sin, -1.0), None, None


def _rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, direction: float) -> torch.Tensor:
    length, half = x.shape[-3], x.shape[-1] // 2
    exchanged = torch.cat((x[..., half:], x[..., :half]), -1)
    return torch.addcmul(x * cos[:length], exchanged, sin[:length], value=direction)
