"""UPT (PAPER.md 4, 5; arXiv 2509.04419): for each prompt either RL or SFT, by how well the policy does.

With at most `upt_gamma` right rollouts, these are dropped and the expert's trajectory is learnt by -upt_sft_coef log pi; with more, GRPO
on the rollouts. One mean over the tokens of both. The published code also skips updates with a gradient norm above 80
(`rl.optimizer.skip_above`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch

from pctrain.data.rows import Row
from pctrain.rl.algorithms.base import Algorithm, Member

if TYPE_CHECKING:
    from pctrain.rl.sampling import Group


class UPT(Algorithm):
    needs_expert = True

    def members(self, groups: Sequence[Group]) -> list[Member]:
        found = []
        for i, group in enumerate(groups):
            learns_by_rl = group.right > self.rl.upt_gamma
            found += [Member(i, k) for k in range(len(group.completions))] if learns_by_rl else [Member(i, None)]
        return found

    def _advantage(self, member: Member, advantages: Sequence[np.ndarray]) -> float:
        return 0.0 if member.index is None else super()._advantage(member, advantages)

    def _row(self, group: Group, member: Member, advantage: float) -> Row:
        """With the stream `sft_weight`: upt_sft_coef on an expert's row, 0 on a rollout's."""
        row = super()._row(group, member, advantage)
        row.streams["sft_weight"] = np.full(len(row), self.rl.upt_sft_coef if member.index is None else 0, np.float32)
        return row

    def loss(self, logprob: torch.Tensor, entropy: torch.Tensor, streams: dict[str, torch.Tensor]):
        loss, metrics = super().loss(logprob, entropy, streams)
        return torch.where(streams["expert"] > 0, -streams["sft_weight"] * logprob, loss), metrics
