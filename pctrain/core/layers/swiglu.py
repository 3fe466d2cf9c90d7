"""The activation of the torch spec's feed-forward, in one autograd node."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable


def swiglu(gate_up: torch.Tensor) -> torch.Tensor:
    """[..., 2 F], gate and up side by side -> silu(gate) * up [..., F]."""
    return _SwiGLU.apply(gate_up)


class _SwiGLU(torch.autograd.Function):
    """The gradient is written into the two halves of one matrix; autograd on its own makes two and copies them together."""

    @staticmethod
    def forward(ctx, gate_up: torch.Tensor) -> torch.Tensor:
        gate, up = gate_up.chunk(2, -1)
        activated = F.silu(gate)
        ctx.save_for_backward(gate_up, activated)
        return activated * up

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: torch.Tensor) -> torch.Tensor:
        gate_up, activated = ctx.saved_tensors
        gate, up = gate_up.chunk(2, -1)
        both = torch.empty_like(gate_up)
        dgate, dup = both.chunk(2, -1)
        torch.mul(grad, activated, out=dup)
        torch.ops.aten.silu_backward.grad_input(torch.mul(grad, up, out=dgate), gate, grad_input=dgate)
        return both
