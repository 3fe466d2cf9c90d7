"""Attention of the torch spec: causal inside each sequence of a pack, with rotary positions, by scaled_dot_product_attention.

One SDPA call a bucket of similar lengths, instead of one a sequence (a Python loop) or one over the whole pack with an O(T^2) mask.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.dot_product_attention import DotProductAttention
from torch.autograd.function import once_differentiable

from pctrain.common.device import device
from pctrain.core.layers.rotary import Rotate, rotation

# What one more bucket costs, as a number of query-key pairs of one head of one channel: its calls, forward and backward, take about as
# long as the attention of so many. (Measured on one core: the optimum is flat from a quarter of it to the double.)
CALL = 2_000_000


@dataclass
class PackedLayout(PackedSeqParams):
    """How the torch spec attends within a pack.

    The sequences of a bucket are laid side by side as [count, length]; slots are the entries of all buckets, one bucket after the other.
    `qkv_format` is not "thd": megatron-core then keeps [T, 1, heads, dim], and queries and keys are rotated here, by the position of each
    token. (megatron-core's own would take the cosine of every token's angles in every layer, for queries and for keys.)
    """

    buckets: list[tuple[int, int]] = None  # (count, length) of each
    index: torch.Tensor | None = (
        None  # int64 [slots]: the position in the pack of each slot; None: the slots are the first positions
    )
    inverse: torch.Tensor | None = None  # int64 [T]: the slot of each position
    filled: int = 0  # positions before the padding at the end
    positions: torch.Tensor = None  # int64 [T], from 0 in every sequence
    angles: torch.Tensor = None  # [longest, 1, 1, dim], set in the forward pass

    @classmethod
    def of(cls, cu_seqlens: torch.Tensor, tokens: int, channels: int) -> PackedLayout:
        """`cu_seqlens` int32 [n + 1] over the real tokens of a pack of `tokens` positions; the padding after them attends to nothing.

        `channels`: heads x dim, which says what attention costs beside a call.
        """
        bounds = cu_seqlens.numpy().astype(np.int64)
        starts, lengths = bounds[:-1], np.diff(bounds)
        positions, inverse = np.zeros(tokens, np.int64), np.zeros(tokens, np.int64)
        positions[: bounds[-1]] = np.arange(bounds[-1]) - np.repeat(starts, lengths)
        buckets, indices, offset = [], [], 0
        for chosen in cut(lengths, CALL / channels):
            count, width = len(chosen), int(lengths[chosen].max())
            column = np.arange(width)
            # Columns beyond a sequence repeat its last token: causal attention never lets a real token see them.
            indices.append((starts[chosen, None] + np.minimum(column, lengths[chosen, None] - 1)).ravel())
            real = (column < lengths[chosen, None]).ravel()
            inverse[indices[-1][real]] = offset + np.flatnonzero(real)
            buckets.append((count, width))
            offset += count * width
        if not buckets:  # a padding pack: nothing to attend to, but every layer still needs an output
            buckets, indices, offset = [(1, 1)], [np.zeros(1, np.int64)], 1
        index = np.concatenate(indices)
        in_place = offset <= tokens and bool((index == np.arange(offset)).all())
        here, longest = device(), int(lengths.max(initial=1))
        return cls(
            qkv_format="packed",
            cu_seqlens_q=cu_seqlens,
            cu_seqlens_kv=cu_seqlens,
            max_seqlen_q=longest,
            max_seqlen_kv=longest,
            buckets=buckets,
            index=None if in_place else torch.from_numpy(index).to(here),
            inverse=None if in_place else torch.from_numpy(inverse).to(here),
            filled=int(bounds[-1]),
            positions=torch.from_numpy(positions).to(here),
        )

    def turn(self, heads: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """cos and signed sin [T, heads, dim]; made once for a pack, not in every layer."""
        known = self.__dict__.setdefault("_turns", {})
        if (heads, dtype) not in known:
            known[heads, dtype] = tuple(x.index_select(0, self.positions) for x in rotation(self.angles, heads, dtype))
        return known[heads, dtype]

    def take(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """[T, heads, dim] -> [count, length, heads, dim] of each bucket."""
        if self.index is not None:
            return _Take.apply(x, self)
        return tuple(part.view(*bucket, *x.shape[1:]) for part, bucket in zip(self.split(x), self.buckets, strict=True))

    def split(self, slots: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """[slots or more, ...] -> [count * length, ...] of each bucket."""
        sizes = [count * length for count, length in self.buckets]
        return slots[: sum(sizes)].split(sizes)

    def put(self, outputs: list[torch.Tensor]) -> torch.Tensor:
        """[count, length, width] of each bucket -> [T, width]; padding gets something finite."""
        flat = [out.reshape(-1, out.shape[-1]) for out in outputs]
        flat = torch.cat(flat) if len(flat) > 1 else flat[0]
        if self.index is not None:
            return _Put.apply(flat, self)
        return F.pad(flat, (0, 0, 0, len(self.positions) - len(flat))) if len(flat) < len(self.positions) else flat


def cut(lengths: np.ndarray, call: float) -> list[np.ndarray]:
    """Sequences into buckets of like lengths: int64 indices of each, longest first, so that calls + areas cost least.

    A bucket of n sequences, the longest of L tokens, costs `call` + n L^2. The cheapest cut of the sorted lengths, by dynamic programming
    over their values; those within 6 % of one another are one value.
    """
    order = np.argsort(-lengths, kind="stable")
    descending = lengths[order]
    grain = np.floor(np.log(np.maximum(descending, 16)) / np.log(1.06))
    firsts = np.concatenate([[0], np.flatnonzero(np.diff(grain)) + 1]) if len(order) else np.zeros(0, np.int64)
    ends = np.concatenate([firsts, [len(order)]])
    best, begin = np.zeros(len(ends)), np.zeros(len(ends), np.int64)
    squares = descending[firsts].astype(np.float64) ** 2
    for end in range(1, len(ends)):
        cost = best[:end] + call + (ends[end] - firsts[:end]) * squares[:end]
        begin[end] = int(cost.argmin())
        best[end] = cost[begin[end]]
    buckets, end = [], len(firsts)
    while end:
        buckets.append(order[ends[begin[end]] : ends[end]])
        end = int(begin[end])
    return buckets[::-1]


class _Take(torch.autograd.Function):
    """Every position into its slot. A slot that repeats a token gets no gradient (no real token sees it, and it is not read), so the way
    back is a look-up too; autograd on its own would add into zeros, once a bucket."""

    @staticmethod
    def forward(ctx, x: torch.Tensor, layout: PackedLayout) -> tuple[torch.Tensor, ...]:
        ctx.layout = layout
        parts = layout.split(x.index_select(0, layout.index))
        return tuple(part.view(*bucket, *x.shape[1:]) for part, bucket in zip(parts, layout.buckets, strict=True))

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads: torch.Tensor):
        layout = ctx.layout
        slots = grads[0].new_empty(len(layout.index), *grads[0].shape[2:])
        for part, grad in zip(layout.split(slots), grads, strict=True):
            part.view_as(grad).copy_(grad)
        of_x = slots.index_select(0, layout.inverse)
        of_x[layout.filled :] = 0
        return of_x, None


class _Put(torch.autograd.Function):
    """The inverse of `_Take`."""

    @staticmethod
    def forward(ctx, flat: torch.Tensor, layout: PackedLayout) -> torch.Tensor:
        ctx.layout = layout
        return flat.index_select(0, layout.inverse)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: torch.Tensor):
        layout = ctx.layout
        slots = grad.new_zeros(len(layout.index), grad.shape[1])
        return slots.index_copy_(0, layout.inverse[: layout.filled], grad[: layout.filled]), None


class PackedSDPA(DotProductAttention):
    """Causal attention inside each sequence of a pack, by torch's scaled_dot_product_attention; rotates queries and keys first."""

    def forward(
        self, query, key, value, attention_mask, attn_mask_type=None, attention_bias=None, packed_seq_params=None
    ):
        """query [T, 1, heads, dim], key and value [T, 1, kv heads, dim] -> [T, 1, heads * dim]."""
        layout: PackedLayout = packed_seq_params
        q, k, v = (x.squeeze(1) for x in (query, key, value))
        q, k = (Rotate.apply(x, *layout.turn(x.shape[1], x.dtype)) for x in (q, k))
        outputs = []
        for parts in zip(*(layout.take(x) for x in (q, k, v)), strict=True):  # [count, length, heads, dim]
            q, k, v = (x.transpose(1, 2) for x in parts)
            out = F.scaled_dot_product_attention(
                q, k, v, is_causal=True, scale=self.softmax_scale, enable_gqa=q.shape[1] != k.shape[1]
            )
            outputs.append(out.transpose(1, 2).flatten(2))
        return layout.put(outputs).unsqueeze(1)
