"""Attention of the torch-varlen spec: torch's variable-length flash attention over a whole pack, on a GPU without Transformer Engine."""

from __future__ import annotations

import importlib.util
import inspect
from dataclasses import dataclass
from functools import cache

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.dot_product_attention import DotProductAttention

from pctrain.common.device import device
from pctrain.core.layers.rotary import Rotate, rotation


@dataclass
class VarlenLayout(PackedSeqParams):
    """A pack as flash attention takes it: the bounds of its sequences, the padding after them as one more.

    `qkv_format` is not "thd": queries and keys are rotated here, by the position of each token. (megatron-core's own would split the pack
    into its sequences, in every layer.)
    """

    positions: torch.Tensor = None  # int64 [T], from 0 in every sequence
    angles: torch.Tensor = None  # [longest, 1, 1, dim], set in the forward pass

    @classmethod
    def of(cls, cu_seqlens: torch.Tensor, tokens: int) -> VarlenLayout:
        """`cu_seqlens` int32 [n + 1] over the sequences of a pack of `tokens` positions."""
        bounds = whole_bounds(cu_seqlens, tokens)
        starts = torch.repeat_interleave(bounds[:-1].long(), bounds.diff().long())
        return cls(**flash_bounds(bounds), qkv_format="varlen", positions=(torch.arange(tokens) - starts).to(device()))

    def turn(self, heads: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """cos and signed sin [T, heads, dim]; made once for a pack, not in every layer."""
        known = self.__dict__.setdefault("_turns", {})
        if (heads, dtype) not in known:
            known[heads, dtype] = tuple(x.index_select(0, self.positions) for x in rotation(self.angles, heads, dtype))
        return known[heads, dtype]


def whole_bounds(cu_seqlens: torch.Tensor, tokens: int) -> torch.Tensor:
    """int32 [n + 1] over the sequences of a pack of `tokens` positions -> the same, the padding after them as one more sequence."""
    return cu_seqlens if int(cu_seqlens[-1]) == tokens else torch.cat([cu_seqlens, cu_seqlens.new_tensor([tokens])])


def flash_bounds(bounds: torch.Tensor) -> dict:
    """`whole_bounds` as the keywords of PackedSeqParams that flash attention reads, on this rank's device."""
    longest, bounds = int(bounds.diff().max()), bounds.to(device())
    return {"cu_seqlens_q": bounds, "cu_seqlens_kv": bounds, "max_seqlen_q": longest, "max_seqlen_kv": longest}


class VarlenAttention(DotProductAttention):
    """Causal attention inside each sequence of a pack, in one call and without padding; rotates queries and keys first."""

    def forward(
        self, query, key, value, attention_mask, attn_mask_type=None, attention_bias=None, packed_seq_params=None
    ):
        """query [T, 1, heads, dim], key and value [T, 1, kv heads, dim], half precision -> [T, 1, heads * dim]."""
        layout: VarlenLayout = packed_seq_params
        q, k, v = (x.squeeze(1) for x in (query, key, value))
        q, k = (Rotate.apply(x, *layout.turn(x.shape[1], x.dtype)) for x in (q, k))
        if not _takes("enable_gqa"):
            k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
        causal = {"window_size": (-1, 0)} if _takes("window_size") else {"is_causal": True}
        options = {"scale": self.softmax_scale, "enable_gqa": q.shape[1] != k.shape[1]}
        out = _varlen().varlen_attn(
            q,
            k,
            v.contiguous(),
            layout.cu_seqlens_q,
            layout.cu_seqlens_kv,
            layout.max_seqlen_q,
            layout.max_seqlen_kv,
            **causal,
            **{name: value for name, value in options.items() if _takes(name)},
        )
        return out.flatten(1).unsqueeze(1)


@cache
def available() -> bool:
    """Whether this torch has it (from 2.10 on)."""
    return importlib.util.find_spec("torch.nn.attention.varlen") is not None


def _varlen():
    return importlib.import_module("torch.nn.attention.varlen")


@cache
def _takes(option: str) -> bool:
    """Whether `varlen_attn` of this torch has an option: 2.10 has `is_causal`, later ones `window_size`, `scale` and `enable_gqa`.

    Where `scale` is missing it is fixed at 1 / sqrt(dim), which is ours.
    """
    return option in inspect.signature(_varlen().varlen_attn).parameters
