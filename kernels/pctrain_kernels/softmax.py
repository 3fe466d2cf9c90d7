"""The softmax of a block of logits: its row statistics, and gradients with respect to the logits.

`softmax_of` chooses the implementation. Every operation of the package goes through it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from pctrain_kernels.backend import runs_triton
from pctrain_kernels.matmul import math_dtype
from pctrain_kernels.merge import RowStatistics, offset, target_gradient


class Softmax(Protocol):
    """The softmax of one shard of logits x [n, k], k > 0; y = (x - max) / temperature with the shard's row maximum."""

    def statistics(self) -> RowStatistics:
        """Return this shard's part of the statistics of the rows, each [n]."""
        ...

    def gradient(
        self,
        row: RowStatistics,
        dlogprob: Tensor,
        dentropy: Tensor | None,
        dtype: torch.dtype,
        *,
        out: Tensor | None = None,
    ) -> Tensor:
        """Return dlogits [n, k] in `dtype`, in the memory of the logits if possible. This must be the last call.

        d logprob / d x_j = ([j = target] - p_j) / temperature, d entropy / d x_j = -p_j (y_j - E[y]) / temperature.

        Args:
            row: statistics of the whole rows.
            dlogprob: [n], derivative of the loss.
            dentropy: [n], likewise, or None if it is not needed.
            dtype: of the result.
            out: [n, k] of that dtype and any row stride, written instead; it may be the logits.
        """
        ...


def softmax_of(
    logits: Tensor,
    column: Tensor,
    *,
    temperature: float,
    want_entropy: bool,
    sharded: bool,
    scratch: Callable[[], Tensor],
    shift: Tensor | None = None,
    keep: bool = False,
) -> Softmax:
    """Return the softmax of `logits` [n, k], whose memory it takes over.

    Args:
        logits: one shard of rows.
        column: int64 [n], the target's column; with `sharded` it may be outside [0, k) because another shard has it.
        temperature: divides the logits.
        want_entropy: whether the statistics are enough for the entropy.
        sharded: whether other ranks have the rest of the vocabulary.
        scratch: makes memory of the size of the logits, for the entropy; the Triton kernels never need it.
        shift: [n], used instead of the row maximum, which is known then. The statistics of the whole rows are known
            too, so `statistics` must not be called.
        keep: the logits belong to the caller: they are only read, whatever their strides.
    """
    if runs_triton(logits):
        from pctrain_kernels.triton_softmax import TritonSoftmax

        if logits.stride(1) != 1 and logits.shape[1] > 1:
            logits, keep = logits.contiguous(), False
        return TritonSoftmax(logits, column, temperature, want_entropy, keep)
    if keep or logits.dtype != math_dtype(logits):
        logits = logits.to(math_dtype(logits), memory_format=torch.contiguous_format, copy=True)
    return TorchSoftmax(logits, column, temperature, want_entropy, sharded, scratch, shift)


class TorchSoftmax:
    """`Softmax` in plain PyTorch: e^y and, if entropy is wanted, e^y y in place of the logits.

    The target's column is 0 in both buffers; its values are in the statistics (merge.py explains why).
    """

    def __init__(
        self,
        logits: Tensor,
        column: Tensor,
        temperature: float,
        want_entropy: bool,
        sharded: bool,
        scratch: Callable[[], Tensor],
        shift: Tensor | None,
    ) -> None:
        self.temperature = temperature
        self.shift = logits.amax(1) if shift is None else shift
        y = logits.sub_(self.shift[:, None])
        if temperature != 1.0:
            y.div_(temperature)
        column = column[:, None]
        columns = logits.shape[1]
        self.owned = (column >= 0) & (column < columns) if sharded else None
        self.column = column if self.owned is None else column.clamp(0, columns - 1)
        self.y_target = y.gather(1, self.column)
        self.e = torch.exp(y, out=scratch()) if want_entropy else y.exp_()
        self._set_target(self.e, torch.zeros_like(self.y_target))
        self.e_y = y.mul_(self.e) if want_entropy else None

    def statistics(self) -> RowStatistics:
        """Return this shard's part of the statistics of the rows, each [n]."""
        target = self.y_target if self.owned is None else self.y_target.masked_fill(~self.owned, -torch.inf)
        return RowStatistics(
            self.shift, self.e.sum(1), None if self.e_y is None else self.e_y.sum(1), target.squeeze(1)
        )

    def gradient(
        self,
        row: RowStatistics,
        dlogprob: Tensor,
        dentropy: Tensor | None,
        dtype: torch.dtype,
        *,
        out: Tensor | None = None,
    ) -> Tensor:
        """Return dlogits [n, k]; see `Softmax`."""
        total = row.sum()
        to_row = offset(self.shift, row.max, self.temperature)
        scale = to_row.exp() / (total * -self.temperature)  # e^y of this shard -> -p / temperature
        factor = dlogprob
        if dentropy is not None:
            factor = dlogprob + dentropy * (to_row - row.mean_shifted())
        gradient = self.e.mul_((scale * factor)[:, None])
        if dentropy is not None:
            assert self.e_y is not None, "a gradient of the entropy needs want_entropy"
            gradient.add_(self.e_y.mul_((scale * dentropy)[:, None]))
        self._set_target(gradient, target_gradient(row, dlogprob, dentropy, self.temperature)[:, None])
        return gradient.to(dtype) if out is None else out.copy_(gradient)

    def _set_target(self, matrix: Tensor, value: Tensor) -> None:
        """Set matrix[i, target_i] = value[i] on the rows whose target this shard has; value [n, 1]."""
        if self.owned is not None:
            value = value.where(self.owned, matrix.gather(1, self.column))
        matrix.scatter_(1, self.column, value)
