"""Statistics of softmax rows, and how those of several vocabulary shards become one.

A shard describes a row by four numbers, with y = (x - max) / temperature the shifted logit of a column:

    max      largest logit x of the shard (not divided by the temperature; -inf for a shard without columns)
    rest     sum of e^y over its columns other than the target
    shifted  sum of e^y y over its columns other than the target (absent where no entropy is wanted)
    target   y of the target; -inf on the shards that do not hold it

Why not the log-sum-exp alone: with logits near 1e4 it loses 3e-4 in fp32, and sum e^y x instead of sum e^y y loses 2e-3 of the entropy.
Why the target is left out of the sums: where it holds almost all of the mass, 1 - p is `rest / sum` to full relative precision, while
the difference 1 - p would have 6e-8 / (1 - p) of relative error, and with it the gradient of every well-learnt token.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from pctrain_kernels.parallel import gather_ranks


class RowStatistics(NamedTuple):
    """Four numbers a row, each [n], fp32 (float64 for float64 inputs); see the head of this file."""

    max: Tensor
    rest: Tensor
    shifted: Tensor | None
    target: Tensor

    def sum(self) -> Tensor:
        """Sum of e^y over all columns."""
        return self.rest + self.target.exp()

    def log_sum(self) -> Tensor:
        # sum - 1 = rest + (e^target - 1): exact where the target is the largest logit (target = 0), as precise as log(sum) elsewhere.
        return (self.rest + self.target.expm1()).log1p()

    def logprob(self) -> Tensor:
        """Log-probability of the target [n]."""
        return self.target - self.log_sum()

    def mean_shifted(self) -> Tensor:
        """Expectation of y under the softmax [n]."""
        assert self.shifted is not None
        return (self.shifted + self.target.exp() * self.target) / self.sum()

    def entropy(self) -> Tensor:
        """Entropy in nats [n]: log(sum e^y) - E[y]."""
        return self.log_sum() - self.mean_shifted()


def empty_shard(none: Tensor, want_entropy: bool) -> RowStatistics:
    """What a shard without valid columns adds: nothing. `none` [n] is -inf."""
    zero = torch.zeros_like(none)
    return RowStatistics(none, zero, zero if want_entropy else None, none)


def offset(shard_max: Tensor, max: Tensor, temperature: float) -> Tensor:
    """What takes the y of a shard to the y of the whole row: (shard_max - max) / temperature; 0 for a shard without columns."""
    # -inf times the zero sums of an empty shard would be NaN. A shard whose logits are all -inf has NaN sums already and keeps them.
    return ((shard_max - max) / temperature).masked_fill(shard_max == -torch.inf, 0)


def merge_shards(shard: RowStatistics, temperature: float, group: dist.ProcessGroup | None) -> RowStatistics:
    """Statistics of the whole rows: one all-gather of [4, n] ([3, n] without entropy), merged in rank order.

    Every rank does the same arithmetic on the same gathered numbers, so the results are equal bit for bit on all ranks.
    """
    return shard if group is None else merge_gathered(gather_ranks(stacked(shard), group), temperature)


def stacked(shard: RowStatistics) -> Tensor:
    """[4, n], or [3, n] without entropy."""
    return torch.stack([part for part in shard if part is not None])


def merge_gathered(every: Tensor, temperature: float) -> RowStatistics:
    """`stacked` shards [ranks, 4 or 3, n] -> statistics of the whole rows."""
    maxes, rests, targets = every[:, 0], every[:, 1], every[:, -1]
    max = maxes.amax(0)
    offsets = offset(maxes, max, temperature)
    scales = offsets.exp()
    return RowStatistics(
        max=max,
        rest=(scales * rests).sum(0),
        shifted=(scales * (every[:, 2] + offsets * rests)).sum(0) if every.shape[1] == 4 else None,
        target=(targets + offsets).amax(0),
    )
