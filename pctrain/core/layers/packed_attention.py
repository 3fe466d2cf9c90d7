"""Attention of the torch spec: causal inside each sequence of a pack, with rotary positions.

It makes one scaled_dot_product_attention call per bucket of sequences of similar length, rather than one per sequence
(a Python loop) or one over the whole pack with an O(T^2) mask.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from megatron.core.transformer.dot_product_attention import DotProductAttention
from torch.autograd.function import FunctionCtx, once_differentiable

from pctrain.core.layers.rotary import RotatedLayout

# The cost of one more bucket, as a number of query-key pairs of one head of one channel: its calls, forward and
# backward, take about as long as the attention of that many. (Measured on one core. The optimum is flat from a quarter
# of this number to twice it.)
CALL = 2_000_000


@dataclass
class PackedLayout(RotatedLayout):
    """The buckets in which the torch spec attends within a pack.

    The sequences of a bucket form a matrix [count, length]. Slots are the entries of all buckets, one bucket after the
    other. megatron-core keeps [T, 1, heads, dim] for this layout.
    """

    buckets: list[tuple[int, int]] = field(default_factory=list)  # (count, length) of each
    # int64 [slots]: the position in the pack of each slot; None if the slots are the first positions in order.
    index: torch.Tensor | None = None
    inverse: torch.Tensor | None = None  # int64 [T]: the slot of each position
    filled: int = 0  # positions before the padding at the end

    @classmethod
    def build(cls, cu_seqlens: torch.Tensor, tokens: int, channels: int) -> PackedLayout:
        """Return the layout of a pack of `tokens` positions; the padding after its sequences attends to nothing.

        Args:
            cu_seqlens: int32 [n + 1] over the sequences.
            tokens: positions of the pack.
            channels: heads x dim, which sets the cost of attention relative to that of a call.
        """
        bounds = cu_seqlens.numpy().astype(np.int64)
        starts, lengths = bounds[:-1], np.diff(bounds)
        positions, inverse = np.zeros(tokens, np.int64), np.zeros(tokens, np.int64)
        positions[: bounds[-1]] = np.arange(bounds[-1]) - np.repeat(starts, lengths)
        buckets: list[tuple[int, int]] = []
        indices: list[np.ndarray] = []
        offset = 0
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
            buckets = [(1, 1)]
            indices = [np.zeros(1, np.int64)]
            offset = 1
        index = np.concatenate(indices)
        in_place = offset <= tokens and bool((index == np.arange(offset)).all())
        longest = int(lengths.max(initial=1))
        return cls(
            qkv_format="packed",
            cu_seqlens_q=cu_seqlens,
            cu_seqlens_kv=cu_seqlens,
            max_seqlen_q=longest,
            max_seqlen_kv=longest,
            buckets=buckets,
            index=None if in_place else torch.from_numpy(index),
            inverse=None if in_place else torch.from_numpy(inverse),
            filled=int(bounds[-1]),
            positions=torch.from_numpy(positions),
        )

    def take(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Return the tokens of x [T, heads, dim] by bucket, [count, length, heads, dim] each."""
        if self.index is not None:
            parts: tuple[torch.Tensor, ...] = _Take.apply(x, self)
            return parts
        return tuple(part.view(*bucket, *x.shape[1:]) for part, bucket in zip(self.split(x), self.buckets, strict=True))

    def split(self, slots: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Return views of `slots` [slots or more, ...] by bucket, [count * length, ...] each."""
        sizes = [count * length for count, length in self.buckets]
        parts: tuple[torch.Tensor, ...] = slots[: sum(sizes)].split(sizes)
        return parts

    def put(self, outputs: list[torch.Tensor]) -> torch.Tensor:
        """Return [T, width] from the buckets' outputs [count, length, width]; padding gets finite values."""
        parts = [out.reshape(-1, out.shape[-1]) for out in outputs]
        flat = torch.cat(parts) if len(parts) > 1 else parts[0]
        if self.index is not None:
            return _Put.apply(flat, self)
        return F.pad(flat, (0, 0, 0, len(self.positions) - len(flat))) if len(flat) < len(self.positions) else flat


def cut(lengths: np.ndarray, call: float) -> list[np.ndarray]:
    """Return the cheapest cut of the sequences into buckets of similar length: int64 indices of each, longest first.

    A bucket of n sequences, the longest of L tokens, costs `call` + n L^2. The cut of the sorted lengths is found by
    dynamic programming over their values; values within 6% of one another count as one.
    """
    order = np.argsort(-lengths, kind="stable")
    descending = lengths[order]
    grain = np.floor(np.log(np.maximum(descending, 16)) / np.log(1.06))
    firsts = np.concatenate([[0], np.flatnonzero(np.diff(grain)) + 1]) if len(order) else np.zeros(0, np.int64)
    ends = np.concatenate([firsts, [len(order)]])
    best = np.zeros(len(ends))
    begin = np.zeros(len(ends), np.int64)
    squares = descending[firsts].astype(np.float64) ** 2
    for end in range(1, len(ends)):
        cost = best[:end] + call + (ends[end] - firsts[:end]) * squares[:end]
        begin[end] = int(cost.argmin())
        best[end] = cost[begin[end]]
    buckets = []
    end = len(firsts)
    while end:
        buckets.append(order[ends[begin[end]] : ends[end]])
        end = int(begin[end])
    return buckets[::-1]


class _Take(torch.autograd.Function):
    """A copy of every position into its slots.

    A slot that repeats a token gets no gradient: no real token attends to it, and nobody reads it. The backward pass is
    therefore a look-up too. autograd would add into zeros, once per bucket.
    """

    @staticmethod
    def forward(ctx: FunctionCtx, x: torch.Tensor, layout: PackedLayout) -> tuple[torch.Tensor, ...]:
        ctx.layout = layout
        parts = layout.split(x.index_select(0, layout.index))
        return tuple(part.view(*bucket, *x.shape[1:]) for part, bucket in zip(parts, layout.buckets, strict=True))

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, *grads: torch.Tensor) -> tuple[torch.Tensor, None]:
        layout = ctx.layout
        slots = grads[0].new_empty(len(layout.index), *grads[0].shape[2:])
        for part, grad in zip(layout.split(slots), grads, strict=True):
            part.view_as(grad).copy_(grad)
        x_grad = slots.index_select(0, layout.inverse)
        x_grad[layout.filled :] = 0
        return x_grad, None


class _Put(torch.autograd.Function):
    """The inverse of `_Take`."""

    @staticmethod
    def forward(ctx: FunctionCtx, flat: torch.Tensor, layout: PackedLayout) -> torch.Tensor:
        ctx.layout = layout
        return flat.index_select(0, layout.inverse)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        layout = ctx.layout
        slots = grad.new_zeros(len(layout.index), grad.shape[1])
        return slots.index_copy_(0, layout.inverse[: layout.filled], grad[: layout.filled]), None


class PackedSDPA(DotProductAttention):
    """Causal attention inside each sequence of a pack, which rotates queries and keys first."""

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        attn_mask_type: Any = None,
        attention_bias: torch.Tensor | None = None,
        packed_seq_params: PackedLayout | None = None,
    ) -> torch.Tensor:
        """Return [T, 1, heads * dim] of query [T, 1, heads, dim], key and value [T, 1, kv heads, dim]."""
        if packed_seq_params is None:
            raise ValueError("the torch spec's attention needs the layout of a pack")
        layout = packed_seq_params
        q, k, v = (x.squeeze(1) for x in (query, key, value))
        q, k = layout.rotate(q), layout.rotate(k)
        outputs = []
        for parts in zip(*(layout.take(x) for x in (q, k, v)), strict=True):  # [count, length, heads, dim]
            q, k, v = (x.transpose(1, 2) for x in parts)
            out = F.scaled_dot_product_attention(
                q, k, v, is_causal=True, scale=self.softmax_scale, enable_gqa=q.shape[1] != k.shape[1]
            )
            outputs.append(out.transpose(1, 2).flatten(2))
        return layout.put(outputs).unsqueeze(1)
