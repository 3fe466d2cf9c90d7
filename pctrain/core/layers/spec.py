"""Layer specs: Transformer Engine where the device has it, plain torch elsewhere; the rest is megatron-core's."""

from __future__ import annotations

import importlib.util

from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig

from pctrain.common.device import on_gpu
from pctrain.common.errors import UserError
from pctrain.config.tree import ModelConfig, ParallelConfig
from pctrain.core.layers import varlen_attention
from pctrain.core.layers.packed_attention import PackedSDPA
from pctrain.core.layers.rms_norm import RMSNorm
from pctrain.core.layers.swiglu import SwiGLU
from pctrain.core.layers.varlen_attention import VarlenAttention
from pctrain.core.megatron_version import mlp_submodules


def choose_spec(model: ModelConfig, parallel: ParallelConfig) -> str:
    """Return `te`, `torch-varlen` or `torch`: what `model.spec` names, or the best that runs on this machine.

    This is the only place of the choice. Raises UserError if the requested spec cannot run on this machine.
    """
    te = on_gpu() and importlib.util.find_spec("transformer_engine") is not None
    varlen = on_gpu() and varlen_attention.available() and model.dtype == "bfloat16"
    # Transformer Engine computes float32 products in TF32, and has no fused attention for them.
    best = "te" if te and model.dtype == "bfloat16" else "torch-varlen" if varlen else "torch"
    spec: str = best if model.spec == "auto" else model.spec
    if spec == "te" and not te:
        raise UserError(
            "model.spec = te needs a CUDA device and Transformer Engine; "
            "install it (pip install 'transformer-engine[pytorch]'), or set model.spec to auto"
        )
    if spec == "torch-varlen" and not varlen:
        raise UserError(
            "model.spec = torch-varlen needs a CUDA device, torch 2.10 or later and model.dtype = bfloat16; "
            "set model.spec to auto"
        )
    if spec != "te":
        for key, is_set in (("parallel.context", parallel.context > 1), ("model.fp8", model.fp8 is not None)):
            if is_set:
                raise UserError(
                    f"{key} needs the layer spec te (Transformer Engine on CUDA devices; auto takes it for "
                    f"model.dtype = bfloat16 only), but this model runs on {spec}; leave {key} out"
                )
    return spec


def layer_spec(
    spec: str, config: TransformerConfig, qk_layernorm: bool = False, vp_stage: int | None = None
) -> ModuleSpec | TransformerBlockSubmodules:
    """Return the decoder spec that GPTModel takes.

    Args:
        spec: from `choose_spec`.
        config: of the model. Its `use_te_activation_func` is set where the spec needs it.
        qk_layernorm: normalize queries and keys.
        vp_stage: the virtual pipeline stage, if there are several.
    """
    if spec == "te":
        return get_gpt_layer_with_transformer_engine_spec(num_experts=config.num_moe_experts, qk_layernorm=qk_layernorm)
    layer = get_gpt_layer_local_spec(
        num_experts=config.num_moe_experts, normalization="RMSNorm", qk_layernorm=qk_layernorm
    )
    attention = layer.submodules.self_attention.submodules
    layer.submodules.input_layernorm = RMSNorm
    layer.submodules.pre_mlp_layernorm = RMSNorm
    attention.core_attention = {"torch": PackedSDPA, "torch-varlen": VarlenAttention}[spec]
    if config.num_moe_experts is None:
        # Despite its name, this flag makes megatron-core's MLP call the activation of its spec.
        mlp_submodules(layer.submodules.mlp).activation_func = SwiGLU
        config.use_te_activation_func = True
    if qk_layernorm:
        attention.q_layernorm = RMSNorm
        attention.k_layernorm = RMSNorm
    return TransformerBlockSubmodules(
        layer_specs=[layer] * get_num_layers_to_build(config, vp_stage), layer_norm=RMSNorm
    )
