"""Log-probability and entropy of every row of a linear head, differentiable, with the logits recomputed in backward.

Four matrix products for a forward and a backward pass, one for a forward pass alone.
"""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from pctrain_kernels.head import Head, HeadOptions, dummy_weight_gradient
from pctrain_kernels.matmul import math_dtype
from pctrain_kernels.merge import RowStatistics, merge_shards
from pctrain_kernels.parallel import reduce_hidden_gradient


def linear_logprob_entropy(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    *,
    vocab_start: int = 0,
    valid_vocab: int | None = None,
    group: dist.ProcessGroup | None = None,
    temperature: float = 1.0,
    ignore_index: int = -100,
    want_entropy: bool = True,
    chunk_tokens: int | None = None,
    grad_weight_out: Tensor | None = None,
    sequence_parallel: bool = False,
    rows: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Return logprob_i = log softmax(W h_i / temperature)[target_i] and entropy_i = -sum p log p (or None), in nats.

    `reference.py` is the definition. The results are [T], fp32 (float64 for float64 inputs) and exactly 0 where target
    is `ignore_index`; such rows cost nothing. A target outside the vocabulary and wrong `rows` fail an assertion.

    Args:
        hidden: [T, H], of the dtype of `weight`.
        weight: [V_l, H], this rank's shard of the output matrix.
        target: int64 [T].
        vocab_start: global index of the first row of `weight`.
        valid_vocab: global size of the vocabulary. Columns from there on are padding; None for no padding.
        group: ranks that hold the shards of the vocabulary, of any sizes. All call with the same target, and get
            results that are equal bit for bit. The gradient of `hidden` is summed over them. One all-gather of [4, n]
            in forward.
        temperature: divides the logits.
        ignore_index: target of rows that are left out.
        want_entropy: without it the entropy is None.
        chunk_tokens: rows whose logits exist at once; None chooses by memory.
        grad_weight_out: fp32 [V_l, H] (Megatron's `main_grad`). Backward adds dW to it, sets
            `weight.grad_added_to_main_grad` and returns a dummy gradient for `weight`.
        sequence_parallel: hidden is this rank's [T / tp, H]; it is gathered inside and its gradient scattered back.
        rows: int64 [n], the ascending positions with a target. Without them the host waits for a GPU to count them.

    Raises:
        ValueError: shapes, dtypes or options do not fit.
    """
    options = HeadOptions(
        vocab_start=vocab_start,
        valid_vocab=valid_vocab,
        group=group,
        temperature=temperature,
        ignore_index=ignore_index,
        want_entropy=want_entropy,
        chunk_tokens=chunk_tokens,
        sequence_parallel=sequence_parallel,
        rows=rows,
    )
    options.check(hidden, weight, target, grad_weight_out)
    if torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad):
        return _LinearLogprobEntropy.apply(hidden, weight, target, options, grad_weight_out)
    with torch.no_grad():
        head = Head(hidden, weight, target, options)
        return _scattered(head, row_statistics(head))


def row_statistics(head: Head) -> RowStatistics:
    """Return the statistics of the n rows with a target: all chunks of this rank, then one merge over the ranks."""
    parts = []
    for piece in head.chunks(equal_on_all_ranks=False):
        chunk = head.chunk(piece)
        chunk.multiply()
        parts.append(chunk.statistics())
    shard = RowStatistics(*(None if column[0] is None else torch.cat(column) for column in zip(*parts, strict=True)))
    return merge_shards(shard, head.options.temperature, head.group)


def _scattered(head: Head, row: RowStatistics) -> tuple[Tensor, Tensor | None]:
    entropy = head.scatter(row.entropy()) if head.options.want_entropy else None
    return head.scatter(row.logprob()), entropy


class _LinearLogprobEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: FunctionCtx,
        hidden: Tensor,
        weight: Tensor,
        target: Tensor,
        options: HeadOptions,
        grad_weight_out: Tensor | None,
    ) -> tuple[Tensor, Tensor | None]:
        head = Head(hidden, weight, target, options)
        row = row_statistics(head)
        ctx.save_for_backward(hidden, weight, target, *row)
        ctx.options = options
        ctx.grad_weight_out = grad_weight_out
        ctx.weight = weight
        ctx.set_materialize_grads(False)
        return _scattered(head, row)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, dlogprob: Tensor | None, dentropy: Tensor | None) -> tuple[Tensor | None, ...]:
        hidden, weight, target, *statistics = ctx.saved_tensors
        row = RowStatistics(*statistics)
        head = Head(hidden, weight, target, replace(ctx.options, want_entropy=dentropy is not None))
        dtype = math_dtype(hidden)
        grad_hidden = torch.zeros_like(head.hidden, dtype=dtype) if ctx.needs_input_grad[0] else None
        grad_weight = ctx.grad_weight_out
        if grad_weight is None and ctx.needs_input_grad[1]:
            grad_weight = torch.zeros_like(weight, dtype=dtype)

        dlogprob = row.max.new_zeros(row.max.shape) if dlogprob is None else head.select(dlogprob)
        dentropy = None if dentropy is None else head.select(dentropy)
        for piece in head.chunks(equal_on_all_ranks=False):
            chunk = head.chunk(piece)
            chunk.multiply(shift=row.max[piece])
            piece_row = RowStatistics(*(None if part is None else part[piece] for part in row))
            chunk.add_gradients(
                piece_row, dlogprob[piece], None if dentropy is None else dentropy[piece], grad_hidden, grad_weight
            )

        if grad_hidden is not None:
            grad_hidden = reduce_hidden_gradient(grad_hidden, head.group, ctx.options.sequence_parallel).to(
                hidden.dtype
            )
        if ctx.grad_weight_out is not None:
            grad_weight = dummy_weight_gradient(ctx.weight)
        elif grad_weight is not None:
            grad_weight = grad_weight.to(weight.dtype)
        return grad_hidden, grad_weight, None, None, None
