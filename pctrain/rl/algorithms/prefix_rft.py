"""Prefix-RFT (PAPER.md 4, 5; arXiv 2507.01679): GRPO in which the last rollout of a group continues the beginning of the expert's answer.

The share of the expert's answer that it is given is low(t) + (high - low(t)) Beta(a, b), low(t) on a cosine from 95 % at the first step to
5 % at the last. Of the prefix's tokens, the advantage is kept on the 20 % with the highest entropy under the policy, and is 0 on the
others, which count in the mean all the same. Prefix and continuation have one ratio r = pi / pi_old, clipped as in GRPO.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from pctrain.data.problems import Problem
from pctrain.data.rows import Row
from pctrain.rl.algorithms.base import Algorithm
from pctrain.rollout.seeds import sampling_seed

if TYPE_CHECKING:
    from pctrain.rl.sampling import Group


class PrefixRFT(Algorithm):
    needs_expert = True

    def prefixes(self, problem: Problem, step: int, total_steps: int, seed: int) -> list[list[int]]:
        """Empty ones, and last the expert's. Its EOS is never among it: something is left to be sampled."""
        low = self.lower_share(step, total_steps)
        rng = np.random.default_rng(sampling_seed(seed, "prefix", step, problem.index, 0))
        draw = rng.beta(self.rl.prefix_beta_a, self.rl.prefix_beta_b)
        length = int((low + (self.rl.prefix_high - low) * draw) * (len(problem.expert_ids) - 1))
        return [*([] for _ in range(self.rl.group - 1)), problem.expert_ids[:length]]

    def lower_share(self, step: int, total_steps: int) -> float:
        """low(t); steps count from 1."""
        start, end = self.rl.prefix_low_start, self.rl.prefix_low_end
        progress = (step - 1) / max(1, total_steps - 1)
        return end + (start - end) * (1 + math.cos(math.pi * progress)) / 2

    @property
    def streams_from_pass(self) -> frozenset[str]:
        return super().streams_from_pass | {"entropy"}

    def finish(self, rows: list[Row], groups: Sequence[Group]) -> list[Row]:
        """Sets the advantage to 0 on the prefix's tokens of low entropy; of n tokens ceil(share n) keep it, of equal ones the earlier."""
        return [self._cut(row) for row in super().finish(rows, groups)]

    def _cut(self, row: Row) -> Row:
        prefix = np.flatnonzero(row.streams["expert"])
        kept = math.ceil(self.rl.prefix_entropy_share * len(prefix) - 1e-9)  # 0.2 x 5 is a little more than 1 in binary
        by_entropy = prefix[np.argsort(-row.streams["entropy"][prefix], kind="stable")]
        advantage = row.streams["advantage"].copy()
        advantage[by_entropy[kept:]] = 0
        return replace(row, streams={**row.streams, "advantage": advantage})
