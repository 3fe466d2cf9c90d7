"""The activation of the torch spec's feed-forward, in one autograd node."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from megatron.core.transformer.module import MegatronModule
from torch.autograd.function import FunctionCtx, once_differentiable


def swiglu(gate_up: torch.Tensor) -> torch.Tensor:
    """Return silu(gate) * up [..., F] of gate_up [..., 2 F], whose halves are gate and up."""
    activated: torch.Tensor = _SwiGLU.apply(gate_up)
    return activated


class SwiGLU(MegatronModule):
    """`swiglu` as the module that a layer spec names."""

    def forward(self, gate_up: torch.Tensor) -> torch.Tensor:
        """Return `swiglu(gate_up)`."""
        return swiglu(gate_up)


def _keeps_activated(gate_up: torch.Tensor) -> bool:
    """Return whether the activated gate is kept for backward. A GPU has more time than memory and computes it again."""
    return gate_up.is_cpu


class _SwiGLU(torch.autograd.Function):
    """SwiGLU whose gradient is written into the halves of one matrix; autograd would make two and copy both."""

    @staticmethod
    def forward(ctx: FunctionCtx, gate_up: torch.Tensor) -> torch.Tensor:
        gate, up = gate_up.chunk(2, -1)
        activated = F.silu(gate)
        ctx.save_for_backward(gate_up, activated if _keeps_activated(gate_up) else None)
        return activated * up

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad: torch.Tensor) -> torch.Tensor:
        gate_up, activated = ctx.saved_tensors
        gate, up = gate_up.chunk(2, -1)
        if activated is None:
            activated = F.silu(gate)
        both = torch.empty_like(gate_up)
        dgate, dup = both.chunk(2, -1)
        torch.mul(grad, activated, out=dup)
        torch.ops.aten.silu_backward.grad_input(torch.mul(grad, up, out=dgate), gate, grad_input=dgate)
        return both
