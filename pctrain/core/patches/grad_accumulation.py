"""Adds weight gradients of megatron-core's linear layers straight into the float32 main_grad, without Apex.

megatron-core takes this product from an Apex extension for GPUs. torch has it too. Without it, every layer's gradient
would be written in the parameter's dtype, rounded to it, and read again to be added. Transformer Engine's layers bring
their own.
"""

from __future__ import annotations

from megatron.core.tensor_parallel import layers
from torch import Tensor

from pctrain.core.patches.patch import Patch
from pctrain_kernels.matmul import add_product, operand


class _TorchProducts:
    """The functions that megatron-core calls of Apex's module; `transformer_config` asks for float32 gradients only."""

    @staticmethod
    def wgrad_gemm_accum_fp32(total_input: Tensor, grad_output: Tensor, main_grad: Tensor) -> None:
        """main_grad [out, in] += grad_output [tokens, out]^T total_input [tokens, in]."""
        add_product(main_grad, operand(grad_output).t(), operand(total_input))


def _is_needed() -> bool:
    return not layers._grad_accum_fusion_available


def _apply() -> None:
    layers.fused_weight_gradient_mlp_cuda = _TorchProducts
    layers._grad_accum_fusion_available = True


PATCH = Patch(
    package="megatron-core",
    version="0.16.1",
    reason="fused accumulation of weight gradients needs an Apex extension for GPUs",
    test="tests/core/test_layouts.py::test_losses_gradient_norms_and_weights_equal_those_of_one_process",
    apply=_apply,
    is_needed=_is_needed,
)
