"""Attention of the torch spec: causal inside each sequence of a pack, with rotary positions, by scaled_dot_product_attention.

One SDPA call a bucket of similar lengths, instead of one a sequence (a Python loop) or one over the whole pack with an O(T^2) mask.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.dot_product_attention import DotProductAttention

from pctrain.core.rotary import Rotate, rotation
from pctrain.device import device


@dataclass(frozen=True)
class Bucket:
    """Sequences of similar length, laid side by side as [count, length]."""

    count: int
    length: int
    start: int | None  # where they begin in the pack, if they lie there one after the other, all of this length: then a view does
    index: torch.Tensor | None  # else int64 [count * length]: the position in the pack of each entry

    def take(self, x: torch.Tensor) -> torch.Tensor:
        """[T, heads, dim] -> [count, length, heads, dim]."""
        rows = x.index_select(0, self.index) if self.start is None else x.narrow(0, self.start, self.count * self.length)
        return rows.view(self.count, self.length, *x.shape[1:])


@dataclass
class PackedLayout(PackedSeqParams):
    """How the torch spec attends within a pack.

    `qkv_format` is not "thd": megatron-core then keeps [T, 1, heads, dim], and queries and keys are rotated here, where positions are the
    columns of a bucket. (megatron-core's own would take the cosine of every token's angles in every layer, for queries and for keys.)
    """

    buckets: list[Bucket] = None
    inverse: torch.Tensor | None = None  # int64 [T]: where each position stands in the concatenated buckets; None: they begin the pack
    angles: torch.Tensor = None  # [longest, 1, 1, dim], set in the forward pass

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
        here = device()
        for k in torch.unique(key).flip(0).tolist():  # longest first, as packs are filled
            chosen = (key == k).nonzero().flatten()
            count, width = len(chosen), int(lengths[chosen].max())
            column = torch.arange(width)[None, :]
            real = column < lengths[chosen, None]
            # Columns beyond a sequence repeat its last token: causal attention never lets a real token see them.
            index = (starts[chosen, None] + torch.minimum(column, lengths[chosen, None] - 1)).flatten()
            inverse[index[real.flatten()]] = offset + real.flatten().nonzero().flatten()
            adjacent = torch.equal(index, torch.arange(int(index[0]), int(index[0]) + len(index)))
            buckets.append(Bucket(count, width, int(index[0]) if adjacent else None, None if adjacent else index.to(here)))
            offset += len(index)
        if not buckets:  # a padding pack: nothing to attend to, but every layer still needs an output
            buckets, offset = [Bucket(1, 1, 0, None)], 1
        in_place = offset <= tokens and torch.equal(inverse[:offset], torch.arange(offset))
        return cls(
            qkv_format="packed",
            cu_seqlens_q=cu_seqlens,
            cu_seqlens_kv=cu_seqlens,
            max_seqlen_q=longest,
            max_seqlen_kv=longest,
            buckets=buckets,
            inverse=None if in_place else inverse.to(here),
        )

    def turn(self, heads: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """cos and signed sin [longest, heads, dim]; made once for a pack, not in every layer."""
        known = self.__dict__.setdefault("_turns", {})
        if (heads, dtype) not in known:
            known[heads, dtype] = rotation(self.angles, heads, dtype)
        return known[heads, dtype]


class PackedSDPA(DotProductAttention):
    """Causal attention inside each sequence of a pack, by torch's scaled_dot_product_attention; rotates queries and keys first."""

    def forward(self, query, key, value, attention_mask, attn_mask_type=None, attention_bias=None, packed_seq_params=None):
        """query [T, 1, heads, dim], key and value [T, 1, kv heads, dim] -> [T, 1, heads * dim]."""
        layout: PackedLayout = packed_seq_params
        outputs = []
        for bucket in layout.buckets:
            q, k, v = (bucket.take(x.squeeze(1)) for x in (query, key, value))  # [n, length, heads, dim]
            q, k = (Rotate.apply(x, *layout.turn(x.shape[2], x.dtype)) for x in (q, k))
            q, k, v = (x.transpose(1, 2) for x in (q, k, v))
            out = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=self.softmax_scale, enable_gqa=q.shape[1] != k.shape[1])
            outputs.append(out.transpose(1, 2).reshape(bucket.count * bucket.length, -1))
        flat = outputs[0] if len(outputs) == 1 else torch.cat(outputs)
        # Padding positions take zeros or the output of slot 0: finite, and their gradient is zero because nothing downstream reads them.
        if layout.inverse is not None:
            flat = flat.index_select(0, layout.inverse)
        elif len(flat) < len(query):
            flat = F.pad(flat, (0, 0, 0, len(query) - len(flat)))
        return flat.unsqueeze(1)
