"""Attention of the torch-varlen spec: torch's variable-length flash attention, on a GPU without Transformer Engine."""

from __future__ import annotations

import importlib.util
import inspect
from dataclasses import dataclass
from functools import cache
from types import ModuleType
from typing import Any

import torch
from megatron.core.transformer.dot_product_attention import DotProductAttention

from pctrain.core.layers.rotary import RotatedLayout


@dataclass
class VarlenLayout(RotatedLayout):
    """A pack as flash attention takes it: the bounds of its sequences, with the padding as one more sequence."""

    @classmethod
    def build(cls, cu_seqlens: torch.Tensor, tokens: int) -> VarlenLayout:
        """Return the layout of a pack of `tokens` positions; `cu_seqlens` is int32 [n + 1] over its sequences."""
        bounds = whole_bounds(cu_seqlens, tokens)
        starts = torch.repeat_interleave(bounds[:-1].long(), bounds.diff().long())
        return cls(**flash_bounds(bounds), qkv_format="varlen", positions=torch.arange(tokens) - starts)


def whole_bounds(cu_seqlens: torch.Tensor, tokens: int) -> torch.Tensor:
    """Return `cu_seqlens` (int32 [n + 1]) with the padding of a pack of `tokens` positions as one more sequence."""
    return cu_seqlens if int(cu_seqlens[-1]) == tokens else torch.cat([cu_seqlens, cu_seqlens.new_tensor([tokens])])


def flash_bounds(bounds: torch.Tensor) -> dict[str, Any]:
    """Return `whole_bounds` as the keywords of PackedSeqParams that flash attention reads."""
    longest = int(bounds.diff().max())
    return {"cu_seqlens_q": bounds, "cu_seqlens_kv": bounds, "max_seqlen_q": longest, "max_seqlen_kv": longest}


class VarlenAttention(DotProductAttention):
    """Causal attention inside each sequence of a pack, in one call; it rotates queries and keys first."""

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        attn_mask_type: Any = None,
        attention_bias: torch.Tensor | None = None,
        packed_seq_params: VarlenLayout | None = None,
    ) -> torch.Tensor:
        """Return [T, 1, heads * dim] of query [T, 1, heads, dim], key and value [T, 1, kv heads, dim] (bfloat16)."""
        if packed_seq_params is None:
            raise ValueError("the torch-varlen attention needs the layout of a pack")
        layout = packed_seq_params
        q, k, v = (x.squeeze(1) for x in (query, key, value))
        q, k = layout.rotate(q), layout.rotate(k)
        options = {"scale": self.softmax_scale, "enable_gqa": q.shape[1] != k.shape[1]}
        out = _varlen().varlen_attn(
            q,
            k,
            v.contiguous(),
            layout.cu_seqlens_q,
            layout.cu_seqlens_kv,
            layout.max_seqlen_q,
            layout.max_seqlen_kv,
            **causal_option(),
            **{name: value for name, value in options.items() if _has_option(name)},
        )
        return out.flatten(1).unsqueeze(1)


@cache
def available() -> bool:
    """Return True if this torch has variable-length attention (2.10 and later do)."""
    return importlib.util.find_spec("torch.nn.attention.varlen") is not None


def causal_option() -> dict[str, Any]:
    """Return the keyword that makes `varlen_attn` of this torch causal."""
    return {"window_size": (-1, 0)} if _has_option("window_size") else {"is_causal": True}


def _varlen() -> ModuleType:
    return importlib.import_module("torch.nn.attention.varlen")


@cache
def _has_option(option: str) -> bool:
    """Return True if `varlen_attn` of this torch takes the option.

    torch 2.10 has `is_causal`; later versions have `window_size`, `scale` and `enable_gqa`. Where `scale` is missing it
    is fixed at 1 / sqrt(dim), which is the scale of every model here. Where `enable_gqa` is missing, nothing compares
    the numbers of heads, and flash attention shares the key and value heads by itself.
    """
    return option in inspect.signature(_varlen().varlen_attn).parameters
