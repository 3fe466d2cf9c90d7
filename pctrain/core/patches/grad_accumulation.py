"""Weight gradients of megatron-core's linear layers, added straight into the fp32 main_grad.

megatron-core takes the product from an extension of Apex, for GPUs. Torch has it too: without it every layer's gradient would be written
in the parameter's dtype, rounded to it, and then read again to be added. (Transformer Engine's layers bring their own.)
"""

from __future__ import annotations

from megatron.core.tensor_parallel import layers
from torch import Tensor

from pctrain_kernels.matmul import add_product, operand


class _TorchProducts:
    """What megatron-core calls of Apex's module; `transformer_config` asks for fp32 gradients alone."""

    @staticmethod
    def wgrad_gemm_accum_fp32(total_input: Tensor, grad_output: Tensor, main_grad: Tensor) -> None:
        """main_grad [out, in] += grad_output [tokens, out]^T total_input [tokens, in]."""
        add_product(main_grad, operand(grad_output).t(), operand(total_input))


def install() -> None:
    """Takes effect where Apex is absent. Call it before a model is built."""
    if not layers._grad_accum_fusion_available:
        layers.fused_weight_gradient_mlp_cuda = _TorchProducts
        layers._grad_accum_fusion_available = True
