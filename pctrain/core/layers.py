"""Layer specs: Transformer Engine where the device has it, plain torch elsewhere. Everything else in a layer is megatron-core's own."""

from __future__ import annotations

import importlib.util

from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec, get_gpt_layer_with_transformer_engine_spec
from megatron.core.transformer.mlp import MLP
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build

from pctrain.core.packed_attention import PackedSDPA
from pctrain.core.rms_norm import RMSNorm
from pctrain.core.swiglu import swiglu
from pctrain.device import on_gpu


def choose_spec(spec: str) -> str:
    """`auto` -> `te` on a CUDA machine with Transformer Engine, else `torch`. The one place of this choice."""
    if spec != "auto":
        return spec
    has_te = on_gpu() and importlib.util.find_spec("transformer_engine") is not None
    return "te" if has_te else "torch"


def layer_spec(spec: str, config, qk_layernorm: bool = False, vp_stage: int | None = None):
    """The decoder spec that GPTModel takes. `spec` is `te` or `torch` (see `choose_spec`); `vp_stage`: which virtual pipeline stage."""
    if spec == "te":
        return get_gpt_layer_with_transformer_engine_spec(num_experts=config.num_moe_experts, qk_layernorm=qk_layernorm)
    layer = get_gpt_layer_local_spec(num_experts=config.num_moe_experts, normalization="RMSNorm", qk_layernorm=qk_layernorm)
    attention = layer.submodules.self_attention.submodules
    layer.submodules.input_layernorm = layer.submodules.pre_mlp_layernorm = RMSNorm
    attention.core_attention = PackedSDPA
    if layer.submodules.mlp.module is MLP:
        # The name notwithstanding: with this flag megatron-core's MLP calls the activation of its spec.
        layer.submodules.mlp.submodules.activation_func = swiglu
        config.use_te_activation_func = True
    if qk_layernorm:
        attention.q_layernorm = attention.k_layernorm = RMSNorm
    return TransformerBlockSubmodules(layer_specs=[layer] * get_num_layers_to_build(config, vp_stage), layer_norm=RMSNorm)
