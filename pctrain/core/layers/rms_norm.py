"""The norm of the torch spec."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.transformer.transformer_config import TransformerConfig
from torch.autograd.function import FunctionCtx, once_differentiable


class RMSNorm(torch.nn.RMSNorm):
    """RMSNorm whose weight is tagged for sequence parallelism.

    megatron-core's torch norm does not tag its weight and therefore refuses sequence parallelism. The tag makes
    `finalize_model_grads` all-reduce the weight's gradient over the tensor parallel group.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: Any) -> None:
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype)
        self.weight.sequence_parallel = config.sequence_parallel

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Normalize x [..., H]."""
        if x.is_cuda or x.dtype != torch.float32:  # torch has one kernel for it on CUDA, and rounds half precision once
            return super().forward(x)
        return _RMSNorm.apply(x, self.weight, self.eps)


class _RMSNorm(torch.autograd.Function):
    """x / sqrt(mean(x^2) + eps) * weight.

    On a CPU, torch composes it and its gradient of single operations, each a pass over new memory.
    """

    @staticmethod
    def forward(ctx: FunctionCtx, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        scale = norm.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        normed = x * scale
        ctx.save_for_backward(normed, scale, weight)
        return normed * weight

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None]:
        normed, scale, weight = ctx.saved_tensors
        width = weight.shape[0]
        product = (grad * normed).reshape(-1, width)
        mean = torch.mv(product, weight).div_(-width).view_as(scale)
        # d x = scale (grad weight - normed mean(grad weight normed))
        return (grad * weight).addcmul_(normed, mean).mul_(scale), product.sum(0), None
