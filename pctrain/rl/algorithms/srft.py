"""SRFT (arXiv 2506.19767; arXiv 2512.11470): SFT and RL in one loss, balanced by entropy. Minimize, per token,

    expert          w1 (-log pi) + w1 (-r_hat A)   r_hat and A as in LUFFY
    right rollout   w2 (-log pi)
    wrong rollout   log pi                         (weight +1, without a bound, as published)

w1 = 0.5 exp(-H) and w2 = 0.1 exp(H), where H is the policy's mean entropy over the tokens of that response, before the
update and without gradient. The entropy bonus is on all tokens.
"""

from __future__ import annotations

import numpy as np
import torch

from pctrain.rl.algorithms.base import Streams
from pctrain.rl.algorithms.grpo import GRPO
from pctrain.rl.algorithms.luffy import shaped
from pctrain.rl.algorithms.options import SRFTOptions
from pctrain.rl.groups import MemberRow, RolloutMember

EXPERT_SCALE = 0.5  # of w1, as published
RIGHT_SCALE = 0.1  # of w2, as published


class SRFT(GRPO):
    """GRPO's advantages with a loss that adds supervised terms, weighted by entropy."""

    Options = SRFTOptions

    def finish(self, rows: list[MemberRow]) -> list[MemberRow]:
        """Add w1 as `sft_weight` and `off_weight` on the expert's rows, and `rollout_weight` on the rollouts'."""
        return [self._with_weights(row) for row in super().finish(rows)]

    def _with_weights(self, row: MemberRow) -> MemberRow:
        trained = row.weights > 0
        entropy = float(row.streams["entropy"][trained].mean(dtype=np.float64)) if trained.any() else 0.0
        expert_weight = rollout_weight = 0.0
        if isinstance(row.member, RolloutMember):
            is_right = row.member.group.rewards[row.member.index] > 0
            rollout_weight = float(RIGHT_SCALE * np.exp(entropy)) if is_right else -1.0
        else:
            expert_weight = float(EXPERT_SCALE * np.exp(-entropy))
        return row.with_streams(
            {"sft_weight": expert_weight, "off_weight": expert_weight, "rollout_weight": rollout_weight}
        )

    def loss(self, logprob: torch.Tensor, entropy: torch.Tensor, streams: Streams) -> tuple[torch.Tensor, Streams]:
        """Return the loss and metrics of the tokens, as the module describes."""
        weight = self.importance_weight(logprob, streams) if self.corrects else torch.ones_like(logprob.detach())
        likelihood = streams["sft_weight"] + weight * streams["rollout_weight"]
        off_policy = streams["off_weight"] * streams["advantage"] * shaped(logprob)
        loss = -likelihood * logprob - off_policy - self.options.entropy_coef * entropy
        metrics = {"entropy": entropy.detach(), "expert": streams["expert"]}
        if self.corrects:
            metrics["is_weight"] = weight * (1 - streams["expert"])
        return loss, metrics
