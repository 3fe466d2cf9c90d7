"""Layer specs: Transformer Engine where the device has it, plain torch elsewhere. Everything else in a layer is megatron-core's own."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec, get_gpt_layer_with_transformer_engine_spec
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build

from pctrain.device import device, on_gpu


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
    if qk_layernorm:
        attention.q_layernorm = attention.k_layernorm = RMSNorm
    return TransformerBlockSubmodules(layer_specs=[layer] * get_num_layers_to_build(config, vp_stage), layer_norm=RMSNorm)


class RMSNorm(torch.nn.RMSNorm):
    """megatron-core's torch norm refuses sequence parallelism because it does not tag its weight.

    This one tags it: `finalize_model_grads` then all-reduces the weight's gradient over the tensor parallel group.
    """

    def __init__(self, config, hidden_size: int, eps: float = 1e-5, **_):
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype)
        self.weight.sequence_parallel = config.sequence_parallel


@dataclass
class PackedLayout(PackedSeqParams):
    """How the torch spec attends within a pack: sequences of similar length are laid side by side in a bucket [sequences, length].

    One SDPA call a bucket instead of one a sequence (a Python loop) or one over the whole pack with an O(T^2) mask.
    `qkv_format` is not "thd", so megatron-core keeps [T, 1, heads, dim] and rotates by the per-token angles that the model gathers.
    """

    buckets: list[torch.Tensor] = None  # int64 [sequences, length] each: positions in the pack
    inverse: torch.Tensor = None  # int64 [T]: where each position stands in the concatenated, flattened buckets

    @classmethod
    def of(cls, cu_seqlens: torch.Tensor, tokens: int) -> PackedLayout:
        """`cu_seqlens` int32 [n + 1] over the real tokens of a pack of `tokens` positions; the padding after them attends to nothing."""
        starts = cu_seqlens[:-1].long()
        lengths = (cu_seqlens[1:] - cu_seqlens[:-1]).long()
        longest = int(lengths.max()) if len(lengths) else 1
        # A bucket holds lengths within a factor of 2, so at most a quarter of its attention area is used worst case and the
        # number of calls is log2 of the spread; below 64 tokens a call costs more than the area it saves.
        key = torch.ceil(torch.log2(lengths.clamp(min=64).double())).long()
        buckets, inverse, offset = [], torch.zeros(tokens, dtype=torch.long), 0
        for k in torch.unique(key).tolist():
            chosen = (key == k).nonzero().flatten()
            width = int(lengths[chosen].max())
            column = torch.arange(width)[None, :]
            real = column < lengths[chosen, None]
            # Columns beyond a sequence repeat its last token: causal attention never lets a real token see them.
            index = starts[chosen, None] + torch.minimum(column, lengths[chosen, None] - 1)
            inverse[index[real]] = offset + real.flatten().nonzero().flatten()
            buckets.append(index)
            offset += index.numel()
        if not buckets:  # a padding pack: nothing to attend to, but every layer still needs an output
            buckets = [torch.zeros(1, 1, dtype=torch.long)]
        here = device()
        return cls(
            qkv_format="packed",
            cu_seqlens_q=cu_seqlens,
            cu_seqlens_kv=cu_seqlens,
            max_seqlen_q=longest,
            max_seqlen_kv=longest,
            buckets=[b.to(here) for b in buckets],
            inverse=inverse.to(here),
        )


class PackedSDPA(DotProductAttention):
    """Causal attention inside each sequence of a pack, by torch's scaled_dot_product_attention."""

    def forward(self, query, key, value, attention_mask, attn_mask_type=None, attention_bias=None, packed_seq_params=None):
        """query [T, 1, heads, dim], key and value [T, 1, kv heads, dim] -> [T, 1, heads * dim]."""
        outputs = []
        for index in packed_seq_params.buckets:
            n, length = index.shape
            rows = (x.squeeze(1).index_select(0, index.flatten()) for x in (query, key, value))
            q, k, v = (x.view(n, length, *x.shape[1:]).transpose(1, 2) for x in rows)  # [n, heads, length, dim]
            out = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=self.softmax_scale, enable_gqa=q.shape[1] != k.shape[1])
            outputs.append(out.transpose(1, 2).reshape(n * length, -1))
        flat = outputs[0] if len(outputs) == 1 else torch.cat(outputs)
        # Padding positions take the output of slot 0: finite, and their gradient is zero because nothing downstream reads them.
        return flat.index_select(0, packed_seq_params.inverse).unsqueeze(1)
