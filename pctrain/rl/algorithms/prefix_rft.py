"""Prefix-RFT (arXiv 2507.01679; arXiv 2512.11470): GRPO whose last rollout continues a prefix of the expert's answer.

The share of the expert's answer that it is given is low(t) + (high - low(t)) Beta(a, b), with low(t) on a cosine from
95% at the first step to 5% at the last. Of the prefix's tokens, the 20% with the highest entropy under the policy keep
their advantage. The advantage of the others is 0, though they count in the mean. Prefix and continuation have one
ratio r = pi / pi_old, clipped as in GRPO.
"""

from __future__ import annotations

import math

import numpy as np

from pctrain.data.problems import Problem
from pctrain.rl.algorithms.grpo import GRPO
from pctrain.rl.algorithms.options import PrefixRFTOptions
from pctrain.rl.groups import MemberRow
from pctrain.rollout.seeds import sampling_seed


class PrefixRFT(GRPO):
    """GRPO with one rollout per group that continues an expert's prefix."""

    Options = PrefixRFTOptions
    options: PrefixRFTOptions

    def prefixes(self, problem: Problem, step: int, total_steps: int, seed: int) -> list[list[int]]:
        """Return empty prefixes and, last, the expert's. It never includes the EOS, so something is left to sample."""
        low = self.lower_share(step, total_steps)
        rng = np.random.default_rng(sampling_seed(seed, "prefix", step, problem.index, 0))
        draw = rng.beta(self.options.beta_a, self.options.beta_b)
        length = int((low + (self.options.high - low) * draw) * (len(problem.expert_ids) - 1))
        return [*([] for _ in range(self.rl.group - 1)), problem.expert_ids[:length]]

    def lower_share(self, step: int, total_steps: int) -> float:
        """Return low(t); steps count from 1."""
        start, end = self.options.low_start, self.options.low_end
        progress = (step - 1) / max(1, total_steps - 1)
        return end + (start - end) * (1 + math.cos(math.pi * progress)) / 2

    def finish(self, rows: list[MemberRow]) -> list[MemberRow]:
        """Set the advantage to 0 on the prefix's tokens of low entropy."""
        return [self._keep_high_entropy(row) for row in super().finish(rows)]

    def _keep_high_entropy(self, row: MemberRow) -> MemberRow:
        """Keep the advantage on ceil(share x n) of the n prefix tokens; among equals the earlier one keeps it."""
        prefix = np.flatnonzero(row.streams["expert"])
        # 0.2 x 5 is a little more than 1 in binary: the tolerance keeps ceil from rounding it up.
        kept = math.ceil(self.options.entropy_share * len(prefix) - 1e-9)
        by_entropy = prefix[np.argsort(-row.streams["entropy"][prefix], kind="stable")]
        advantage = row.streams["advantage"].copy()
        advantage[by_entropy[kept:]] = 0
        return row.with_streams({"advantage": advantage})
