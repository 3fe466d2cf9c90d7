"""SRFT (PAPER.md 4, 5; arXiv 2506.19767): SFT and RL in one loss, balanced by the policy's entropy. Per token, to be minimised:

    expert          w1 (-log pi) + w1 (-r_hat A)     r_hat = pi / (pi + 0.1), A = R - mean R over the rollouts and the expert, as in LUFFY
    right rollout   w2 (-log pi)
    wrong rollout   log pi                           (weight +1, without a bound, as published)

w1 = 0.5 exp(-H), w2 = 0.1 exp(H), with H the mean entropy of the policy over the tokens of that response, before the update, without
gradient. The entropy bonus is on all tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import torch

from pctrain.data.rows import Row
from pctrain.rl.algorithms import policy
from pctrain.rl.algorithms.base import Algorithm
from pctrain.rl.algorithms.luffy import SHAPING

if TYPE_CHECKING:
    from pctrain.rl.sampling import Group

EXPERT_SCALE, RIGHT_SCALE = 0.5, 0.1  # of w1 and w2, as published


class SRFT(Algorithm):
    needs_expert = True
    expert_in_group = True

    @property
    def streams_from_pass(self) -> frozenset[str]:
        return super().streams_from_pass | {"entropy"}

    def finish(self, rows: list[Row], groups: Sequence[Group]) -> list[Row]:
        """Adds w1 on the expert's tokens as `sft_weight` and `off_weight`, and `rollout_weight`: w2 on right rollouts, -1 on wrong ones."""
        finished = []
        for row, member in zip(super().finish(rows, groups), self.members(groups), strict=True):
            trained = row.weights > 0
            entropy = float(row.streams["entropy"][trained].mean(dtype=np.float64)) if trained.any() else 0.0
            w1 = rollout = 0.0
            if member.index is None:
                w1 = EXPERT_SCALE * np.exp(-entropy)
            else:
                right = groups[member.group].rewards[member.index] > 0
                rollout = RIGHT_SCALE * np.exp(entropy) if right else -1.0
            weights = {"sft_weight": w1, "off_weight": w1, "rollout_weight": rollout}
            streams = {name: np.full(len(row), value, np.float32) for name, value in weights.items()}
            finished.append(replace(row, streams={**row.streams, **streams}))
        return finished

    def loss(self, logprob: torch.Tensor, entropy: torch.Tensor, streams: dict[str, torch.Tensor]):
        probability = logprob.exp()
        shaped = probability / (probability + SHAPING)
        weight = self._is_weight(logprob, streams)
        likelihood = streams["sft_weight"] + weight * streams["rollout_weight"]
        loss = (
            -likelihood * logprob - streams["off_weight"] * streams["advantage"] * shaped - self.entropy_coef * entropy
        )
        metrics = {"entropy": entropy.detach(), "expert": streams["expert"]}
        if self.corrects:
            metrics["is_weight"] = weight * (1 - streams["expert"])
        return loss, metrics

    def _is_weight(self, logprob: torch.Tensor, streams: dict[str, torch.Tensor]) -> torch.Tensor:
        if self.rl.is_correction == "token":
            log_ratio = streams.get("old_logprob", logprob.detach()) - policy.rollout_or_old(logprob, streams)
            return log_ratio.exp().clamp(max=self.rl.is_cap)
        return streams.get("is_weight", torch.ones_like(logprob, requires_grad=False))
