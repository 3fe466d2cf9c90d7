"""The softmax of a block of logits: its row statistics, and the gradient of what is computed from them with respect to the logits.

`softmax_of` picks how: every operation of the package goes through it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from pctrain_kernels.backend import runs_triton
from pctrain_kernels.matmul import math_dtype
from pctrain_kernels.merge import RowStatistics, offset


class Softmax(Protocol):
    """Rows of logits x [n, k], k > 0, one vocabulary shard; y = (x - max) / temperature with the shard's row maximum."""

    def statistics(self) -> RowStatistics:
        """This shard's part of the statistics of the rows, each [n]."""

    def gradient(
        self,
        row: RowStatistics,
        dlogprob: Tensor,
        dentropy: Tensor | None,
        dtype: torch.dtype,
        *,
        out: Tensor | None = None,
    ) -> Tensor:
        """dlogits [n, k] in `dtype`, in the memory of the logits where it can be. The last thing that is asked for.

        out: [n, k] of that dtype and any row stride, written instead; it may be the logits.

        row: statistics of the whole rows; dlogprob, dentropy [n]: derivatives of the loss (dentropy None: not needed).
        d logprob / d x_j = ([j = target] - p_j) / temperature, d entropy / d x_j = -p_j (y_j - E[y]) / temperature.
        """


def softmax_of(
    logits: Tensor, column: Tensor, *, temperature: float, want_entropy: bool, sharded: bool, scratch: Callable[[], Tensor],
    shift: Tensor | None = None, keep: bool = False,
) -> Softmax:  # fmt: skip
    """Takes over the memory of `logits` [n, k].

    column     int64 [n], the target's column; with `sharded` it may lie outside [0, k): another shard holds it
    scratch    memory of the size of the logits, asked for where entropy is wanted, but never by the Triton kernels
    shift      [n] or None: taken instead of the row maximum (which is known then, and not looked for again). `statistics` is not for
               this case: those of the whole rows are known too
    keep       the logits are the caller's: read alone, whatever their strides
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
    """e^y, and with entropy wanted e^y y, in place of the logits.

    The target's column is 0 in both buffers; its values are in the statistics (merge.py says why).
    """

    def __init__(
        self, logits: Tensor, column: Tensor, temperature: float, want_entropy: bool, sharded: bool, scratch: Callable[[], Tensor],
        shift: Tensor | None,
    ) -> None:  # fmt: skip
        self.temperature = temperature
        self.shift = logits.amax(1) if shift is None else shift
        y = logits.sub_(self.shift[:, None])
        if temperature != 1.0:
            y.div_(temperature)
        column, columns = column[:, None], logits.shape[1]
        self.owned = (column >= 0) & (column < columns) if sharded else None
        self.column = column if self.owned is None else column.clamp(0, columns - 1)
        self.y_target = y.gather(1, self.column)
        self.e = torch.exp(y, out=scratch()) if want_entropy else y.exp_()
        self._set_target(self.e, torch.zeros_like(self.y_target))
        self.e_y = y.mul_(self.e) if want_entropy else None

    def statistics(self) -> RowStatistics:
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
        total = row.sum()
        to_row = offset(self.shift, row.max, self.temperature)
        scale = to_row.exp() / (total * -self.temperature)  # e^y of this shard -> -p / temperature
        factor = dlogprob
        if dentropy is not None:
            factor = dlogprob + dentropy * (to_row - row.mean_shifted())
            self.e_y.mul_((scale * dentropy)[:, None])
        gradient = self.e.mul_((scale * factor)[:, None])
        if dentropy is not None:
            gradient.add_(self.e_y)
        self._set_target(gradient, target_gradient(row, dlogprob, dentropy, self.temperature)[:, None])
        return gradient.to(dtype) if out is None else out.copy_(gradient)

    def _set_target(self, matrix: Tensor, value: Tensor) -> None:
        """matrix[i, target_i] = value[i] on the rows whose target this shard holds; value [n, 1]."""
        if self.owned is not None:
            value = value.where(self.owned, matrix.gather(1, self.column))
        matrix.scatter_(1, self.column, value)


def target_gradient(row: RowStatistics, dlogprob: Tensor, dentropy: Tensor | None, temperature: float) -> Tensor:
    """dlogits of the target's column [n]: 1 - p without the difference, so that a confident target keeps its precision."""
    total = row.sum()
    value = dlogprob * row.rest / total
    if dentropy is not None:
        value = value - dentropy * (row.target.exp() / total) * (row.target - row.mean_shifted())
    return value / temperature
