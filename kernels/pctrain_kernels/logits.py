"""Log-probability, entropy and cross entropy of given logits, vocabulary parallel.

The logits are read once in forward and once in backward, a block of rows at a time. Only the gradient has their size.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from pctrain_kernels.head import GPU_LOGITS_BYTES
from pctrain_kernels.matmul import math_dtype
from pctrain_kernels.merge import RowStatistics, empty_shard, merge_gathered, offset, stacked
from pctrain_kernels.parallel import gather_ranks
from pctrain_kernels.rows import LabelledRows
from pctrain_kernels.softmax import Softmax, softmax_of

# Full precision bytes of a block of rows: besides the result, only a few such blocks are in memory.
CPU_BLOCK_BYTES = 2**22


def vocab_parallel_logprob_entropy(
    logits: Tensor,
    target: Tensor,
    *,
    vocab_start: int = 0,
    valid_vocab: int | None = None,
    group: dist.ProcessGroup | None = None,
    temperature: float = 1.0,
    ignore_index: int = -100,
    want_entropy: bool = True,
    inplace_backward: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Return logprob_i = log softmax(x_i / temperature)[target_i] and entropy_i = -sum p log p, in nats.

    `reference.py` is the definition. The results are fp32 (float64 for float64 logits) and exactly 0 where target is
    `ignore_index`; the gradient is 0 there, whatever the logits are. A target outside the vocabulary fails an
    assertion.

    Args:
        logits: x [T, V_l], this rank's shard, of any floating dtype and strides.
        target: int64 [T].
        vocab_start: global index of the first column.
        valid_vocab: global size of the vocabulary. Columns from there on are padding; None for no padding.
        group: ranks that hold the shards of the vocabulary, of any sizes. All call with the same target, and get
            results that are equal bit for bit. One all-gather of [4, n] in forward ([3, n] without entropy) for n rows
            with a target, none in backward.
        temperature: divides the logits.
        ignore_index: target of rows that are left out.
        want_entropy: without it the entropy is None.
        inplace_backward: the gradient is written into the memory of the logits. Nothing may read them after backward
            has begun, and there is one backward pass.

    Returns:
        logprob [T], and entropy [T] or None.

    Raises:
        ValueError: shapes, dtypes or options do not fit.
    """
    options = LogitsOptions(
        vocab_start=vocab_start,
        valid_vocab=valid_vocab,
        group=group,
        temperature=temperature,
        ignore_index=ignore_index,
        want_entropy=want_entropy,
        inplace_backward=inplace_backward,
    )
    values = _values(logits, target, options)
    return values.logprob, values.entropy


def vocab_parallel_cross_entropy(
    logits: Tensor,
    target: Tensor,
    *,
    vocab_start: int = 0,
    valid_vocab: int | None = None,
    group: dist.ProcessGroup | None = None,
    temperature: float = 1.0,
    ignore_index: int = -100,
    inplace_backward: bool = False,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
) -> Tensor:
    """Return the loss [T] = (1 - label_smoothing) nll + label_smoothing mean_j(-log p_j) + z_loss lse^2.

    p = softmax(x / temperature), nll = -log p[target], j runs over the valid vocabulary and
    lse = log sum_j exp(x_j / temperature). The loss is exactly 0 where target is `ignore_index`. Inputs and keywords
    are those of `vocab_parallel_logprob_entropy`. There is still one all-gather: of [3, n], with label
    smoothing of [5, n].
    """
    if not 0 <= label_smoothing <= 1:
        raise ValueError(f"label_smoothing must be in [0, 1], got {label_smoothing}")
    if not z_loss >= 0:
        raise ValueError(f"z_loss must not be negative, got {z_loss}")
    options = LogitsOptions(
        vocab_start=vocab_start,
        valid_vocab=valid_vocab,
        group=group,
        temperature=temperature,
        ignore_index=ignore_index,
        want_entropy=False,
        inplace_backward=inplace_backward,
        want_mean_nll=label_smoothing > 0,
        want_lse=z_loss > 0,
    )
    values = _values(logits, target, options)
    loss = -values.logprob
    if values.mean_nll is not None:
        loss = (1 - label_smoothing) * loss + label_smoothing * values.mean_nll
    if values.lse is not None:
        loss = loss + z_loss * values.lse.square()
    return loss


@dataclass(frozen=True, kw_only=True)
class LogitsOptions:
    """The keywords of both operations, and which values of a row are wanted besides the log-probability."""

    vocab_start: int
    valid_vocab: int | None
    group: dist.ProcessGroup | None
    temperature: float
    ignore_index: int
    want_entropy: bool
    inplace_backward: bool
    want_mean_nll: bool = False
    want_lse: bool = False

    def check(self, logits: Tensor, target: Tensor) -> None:
        """Raise ValueError if shapes, dtypes or options do not fit each other."""
        if logits.ndim != 2 or not logits.dtype.is_floating_point:
            raise ValueError(
                f"expected logits [T, V] of a floating point dtype, got {logits.dtype} {list(logits.shape)}"
            )
        if target.shape != logits.shape[:1] or target.dtype != torch.int64:
            raise ValueError(f"expected target int64 [{logits.shape[0]}], got {target.dtype} {list(target.shape)}")
        if not self.temperature > 0:
            raise ValueError(f"temperature must be above 0, got {self.temperature}")
        if self.valid_vocab is not None and self.valid_vocab < 1:
            raise ValueError(f"valid_vocab must be at least 1, got {self.valid_vocab}")
        expanded = any(stride == 0 and size > 1 for stride, size in zip(logits.stride(), logits.shape, strict=True))
        if self.inplace_backward and expanded:
            raise ValueError("inplace_backward=True needs separate memory for every logit, not an expanded tensor")


class Values(NamedTuple):
    """Values of each token, [T], 0 on ignored tokens; all but the first are None unless wanted.

    `mean_nll` is the mean over the vocabulary of -log p, and `lse` is log sum exp(x / temperature).
    """

    logprob: Tensor
    entropy: Tensor | None
    mean_nll: Tensor | None
    lse: Tensor | None


def _values(logits: Tensor, target: Tensor, options: LogitsOptions) -> Values:
    options.check(logits, target)
    if torch.is_grad_enabled() and logits.requires_grad:
        return Values(*_LogitsValues.apply(logits, target, options))
    with torch.no_grad():
        block = _Rows(logits, target, options)
        return block.values(*block.statistics())


class _Rows(LabelledRows):
    """The n rows with a target and the k valid columns of one call's logits: x [T, k], target [n], rows [n] or None."""

    def __init__(self, logits: Tensor, target: Tensor, options: LogitsOptions) -> None:
        super().__init__(target, options.ignore_index)
        self.options = options
        group = options.group
        self.group = None if group is None or dist.get_world_size(group) == 1 else group
        end = logits.shape[1] if options.valid_vocab is None else options.valid_vocab - options.vocab_start
        self.x = logits[:, : max(0, end)]
        self.columns = self.x.shape[1]
        self.check_targets(options.vocab_start, self.columns, options.valid_vocab, sharded=self.group is not None)

    def blocks(self) -> Iterator[slice]:
        """Yield pieces of the n rows; none if the shard has no valid columns."""
        n = self.target.shape[0]
        budget = GPU_LOGITS_BYTES if self.x.is_cuda else CPU_BLOCK_BYTES
        size = max(1, budget // (math_dtype(self.x).itemsize * max(1, self.columns)))
        for start in range(0, n if self.columns else 0, size):
            yield slice(start, min(n, start + size))

    def logits(self, piece: slice) -> Tensor:
        """Return [m, k]: the caller's memory if all rows have a target, else a copy."""
        return self.x[piece] if self.rows is None else self.x.index_select(0, self.rows[piece])

    def column(self, piece: slice) -> Tensor:
        """Return the target's column in this shard, [m]; outside [0, k) if another shard has it."""
        return self.target[piece] - self.options.vocab_start

    def softmax(self, piece: slice, *, want_entropy: bool, shift: Tensor | None = None) -> Softmax:
        """Return the softmax of a piece; `shift` as in `softmax_of`."""
        x = self.logits(piece)
        return softmax_of(
            x,
            self.column(piece),
            temperature=self.options.temperature,
            want_entropy=want_entropy,
            sharded=self.group is not None,
            scratch=lambda: torch.empty(x.shape, dtype=math_dtype(x), device=x.device),
            shift=shift,
            keep=self.rows is None,
        )

    def statistics(self) -> tuple[RowStatistics, Tensor | None, Tensor | None]:
        """Return the statistics of the whole rows and, for `want_mean_nll`, the mean of y [n] and the columns [n].

        One collective.
        """
        options = self.options
        n = self.target.shape[0]
        none = torch.full((n,), -torch.inf, dtype=math_dtype(self.x), device=self.x.device)
        shard = empty_shard(none, options.want_entropy)
        shard = RowStatistics(*(None if part is None else part.clone() for part in shard))  # overwritten block by block
        y_sum = torch.zeros_like(none)
        for piece in self.blocks():
            of_piece = self.softmax(piece, want_entropy=options.want_entropy).statistics()
            for whole, part in zip(shard, of_piece, strict=True):
                if whole is not None:
                    whole[piece] = part
            if options.want_mean_nll:
                y_sum[piece] = (self.logits(piece).to(y_sum.dtype) - of_piece.max[:, None]).sum(1) / options.temperature
        if not options.want_mean_nll:
            return self._merged(stacked(shard))[0], None, None
        columns = torch.full_like(y_sum, self.columns)
        row, every = self._merged(torch.stack([*stacked(shard), y_sum, columns]), extra=2)
        y_sums, counts = every[:, -2], every[:, -1]
        y_sum = (y_sums + counts * offset(every[:, 0], row.max, options.temperature)).sum(0)
        return row, y_sum / counts.sum(0), counts.sum(0)

    def _merged(self, mine: Tensor, extra: int = 0) -> tuple[RowStatistics, Tensor]:
        """Return (statistics of the whole rows, gathered [ranks, rows, n]) from this shard's `stacked` statistics.

        `mine` has `extra` more rows behind them.
        """
        every = mine[None] if self.group is None else gather_ranks(mine, self.group)
        return merge_gathered(every[:, : every.shape[1] - extra], self.options.temperature), every

    def values(self, row: RowStatistics, y_mean: Tensor | None, columns: Tensor | None) -> Values:
        """Return the values of all T tokens."""
        options = self.options
        return Values(
            self.scatter(row.logprob()),
            self.scatter(row.entropy()) if options.want_entropy else None,
            None if y_mean is None else self.scatter(row.log_sum() - y_mean),
            self.scatter(row.max / options.temperature + row.log_sum()) if options.want_lse else None,
        )

    def add_terms(self, piece: slice, gradient: Tensor, dlse: Tensor, duniform: Tensor) -> None:
        """Add dlse [m] to the target's column and duniform [m] to all columns of the full precision `gradient`."""
        column = self.column(piece)
        owned = (column >= 0) & (column < self.columns)
        gradient.add_(duniform[:, None])
        gradient.scatter_add_(1, column.clamp(0, self.columns - 1)[:, None], dlse.where(owned, 0)[:, None])


class _LogitsValues(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, logits: Tensor, target: Tensor, options: LogitsOptions) -> tuple[Tensor | None, ...]:
        rows = _Rows(logits, target, options)
        row, y_mean, columns = rows.statistics()
        ctx.save_for_backward(logits, target, columns, *row)
        ctx.options = options
        ctx.set_materialize_grads(False)
        return tuple(rows.values(row, y_mean, columns))

    @staticmethod
    @once_differentiable
    def backward(
        ctx: FunctionCtx,
        dlogprob: Tensor | None,
        dentropy: Tensor | None,
        dmean_nll: Tensor | None,
        dlse: Tensor | None,
    ) -> tuple[Tensor | None, ...]:
        logits, target, columns, *statistics = ctx.saved_tensors
        options, row = ctx.options, RowStatistics(*statistics)
        rows = _Rows(logits, target, options)
        gradient = _gradient_memory(logits, target, rows)
        zero = torch.zeros_like(row.max)
        dlogprob, dmean_nll, dlse = (zero if d is None else rows.select(d) for d in (dlogprob, dmean_nll, dlse))
        dentropy = None if dentropy is None else rows.select(dentropy)
        # With y = x / temperature: d logprob / d y_j = [j = target] - p_j, d lse / d y_j = p_j and
        # d mean_nll / d y_j = p_j - 1 / columns. So their p_j are subtracted from dlogprob, and the target's column is
        # corrected afterwards.
        has_more_terms = options.want_mean_nll or options.want_lse
        dp = dmean_nll + dlse
        duniform = zero if columns is None else -dmean_nll / (columns * options.temperature)
        for piece in rows.blocks():
            softmax = rows.softmax(piece, want_entropy=dentropy is not None, shift=row.max[piece])
            piece_row = RowStatistics(*(None if part is None else part[piece] for part in row))
            derivatives = (dlogprob - dp)[piece], None if dentropy is None else dentropy[piece]
            if rows.rows is None and not has_more_terms:
                softmax.gradient(piece_row, *derivatives, logits.dtype, out=gradient[piece, : rows.columns])
                continue
            part = softmax.gradient(piece_row, *derivatives, math_dtype(logits) if has_more_terms else logits.dtype)
            if has_more_terms:
                rows.add_terms(piece, part, dp[piece] / options.temperature, duniform[piece])
            if rows.rows is None:
                gradient[piece, : rows.columns] = part
            else:
                gradient[:, : rows.columns].index_copy_(0, rows.rows[piece], part.to(logits.dtype))
        return gradient, None, None


def _gradient_memory(logits: Tensor, target: Tensor, rows: _Rows) -> Tensor:
    """Return memory for the gradient [T, V_l], with zeros in padding columns and ignored rows."""
    options = rows.options
    if options.inplace_backward:
        # From here on the logits are gone, so whatever reads them, such as a second backward pass, must fail.
        torch.autograd.graph.increment_version(logits)
    gradient = logits.data if options.inplace_backward else torch.empty_like(logits)
    gradient[:, rows.columns :] = 0
    if rows.rows is not None:
        gradient.index_fill_(0, (target == options.ignore_index).nonzero().squeeze(1), 0)
    return gradient
