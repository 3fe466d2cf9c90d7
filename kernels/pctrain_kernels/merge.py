"""Statistics of softmax rows, how those of several vocabulary shards become one, and the gradient of the target.

A shard describes a row by four numbers, with y = (x - max) / temperature the shifted logit of a column:

    max      largest logit x of the shard (not divided by the temperature; -inf for a shard without columns)
    rest     sum of e^y over its columns other than the target
    shifted  sum of e^y y over its columns other than the target (absent if no entropy is wanted)
    target   y of the target; -inf on the shards that do not hold it

The log-sum-exp alone would not do: with logits near 1e4 it loses 3e-4 in fp32, and sum e^y x instead of sum e^y y loses
2e-3 of the entropy. The target is left out of the sums because, if it has almost all of the mass, 1 - p is `rest / sum`
to full relative precision, while the difference 1 - p would have a relative error of 6e-8 / (1 - p), and with it the
gradient of every well-learned token.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from pctrain_kernels.parallel import gather_ranks


class RowStatistics(NamedTuple):
    """Four numbers per row, each [n], fp32 (float64 for float64 inputs); the head of this file explains them."""

    max: Tensor
    rest: Tensor
    shifted: Tensor | None
    target: Tensor

    def sum(self) -> Tensor:
        """Return the sum of e^y over all columns [n]."""
        return self.rest + self.target.exp()

    def log_sum(self) -> Tensor:
        """Return the log of `sum` [n]."""
        # sum - 1 = rest + (e^target - 1): exact where the target is the largest logit (target = 0), as precise as
        # log(sum) elsewhere.
        return (self.rest + self.target.expm1()).log1p()

    def logprob(self) -> Tensor:
        """Return the log-probability of the target [n]."""
        return self.target - self.log_sum()

    def mean_shifted(self) -> Tensor:
        """Return the expectation of y under the softmax [n]."""
        assert self.shifted is not None
        return (self.shifted + self.target.exp() * self.target) / self.sum()

    def entropy(self) -> Tensor:
        """Return the entropy in nats [n]: log(sum e^y) - E[y]."""
        return self.log_sum() - self.mean_shifted()


def target_gradient(row: RowStatistics, dlogprob: Tensor, dentropy: Tensor | None, temperature: float) -> Tensor:
    """Return dlogits of the target's column [n]: 1 - p without the difference, so a confident target stays precise."""
    total = row.sum()
    value = dlogprob * row.rest / total
    if dentropy is not None:
        value = value - dentropy * (row.target.exp() / total) * (row.target - row.mean_shifted())
    return value / temperature


def empty_shard(none: Tensor, want_entropy: bool) -> RowStatistics:
    """Return the statistics of a shard without valid columns, which add nothing. `none` [n] is -inf."""
    zero = torch.zeros_like(none)
    return RowStatistics(none, zero, zero if want_entropy else None, none)


def offset(shard_max: Tensor, max: Tensor, temperature: float) -> Tensor:
    """Return what turns the y of a shard into the y of the whole row; 0 for a shard without columns."""
    # -inf times the zero sums of an empty shard would be NaN. A shard whose logits are all -inf has NaN sums already,
    # and keeps them.
    return ((shard_max - max) / temperature).masked_fill(shard_max == -torch.inf, 0)


def merge_shards(shard: RowStatistics, temperature: float, group: dist.ProcessGroup | None) -> RowStatistics:
    """Return the statistics of the whole rows: one all-gather of [4, n] ([3, n] without entropy), merged in rank order.

    Every rank does the same arithmetic on the same gathered numbers, so the results are equal bit for bit on all ranks.
    """
    return shard if group is None else merge_gathered(gather_ranks(stacked(shard), group), temperature)


def stacked(shard: RowStatistics) -> Tensor:
    """Return the statistics as one tensor [4, n], or [3, n] without entropy."""
    return torch.stack([part for part in shard if part is not None])


def merge_gathered(every: Tensor, temperature: float) -> RowStatistics:
    """Return the statistics of the whole rows from the `stacked` ones of all shards [ranks, 4 or 3, n]."""
    maxes = every[:, 0]
    rests = every[:, 1]
    targets = every[:, -1]
    max = maxes.amax(0)
    offsets = offset(maxes, max, temperature)
    scales = offsets.exp()
    return RowStatistics(
        max=max,
        rest=(scales * rests).sum(0),
        shifted=(scales * (every[:, 2] + offsets * rests)).sum(0) if every.shape[1] == 4 else None,
        target=(targets + offsets).amax(0),
    )
