"""UPT (arXiv 2509.04419; arXiv 2512.11470): either RL or SFT for each prompt, depending on how well the policy does.

With more than `gamma` right rollouts, a prompt is learned from its rollouts by GRPO's loss. Otherwise its rollouts
are dropped, and the expert's trajectory is learned by -sft_coef log pi. One mean over the tokens of both. The
published code also skips updates with a gradient norm above 80 (`rl.optimizer.skip_above`).
"""

from __future__ import annotations

import torch

from pctrain.rl.algorithms.base import Streams
from pctrain.rl.algorithms.grpo import GRPO
from pctrain.rl.algorithms.options import UPTOptions
from pctrain.rl.groups import ExpertMember, Group, Member, MemberRow


class UPT(GRPO):
    """GRPO on prompts that the policy can solve, SFT on the others."""

    Options = UPTOptions
    options: UPTOptions

    def members(self, group: Group) -> list[Member]:
        """Return the rollouts of a prompt that is learned by RL, or else the expert alone."""
        return super().members(group) if group.right > self.options.gamma else [ExpertMember(group)]

    def row(self, member: Member, advantage: float) -> MemberRow:
        """Add the stream `sft_weight`: sft_coef on an expert's row, 0 on a rollout's."""
        coefficient = self.options.sft_coef if member.is_expert else 0.0
        return super().row(member, advantage).with_streams({"sft_weight": coefficient})

    def loss(self, logprob: torch.Tensor, entropy: torch.Tensor, streams: Streams) -> tuple[torch.Tensor, Streams]:
        """Return GRPO's loss on rollouts, and the negative log-likelihood on the expert's tokens."""
        loss, metrics = super().loss(logprob, entropy, streams)
        return torch.where(streams["expert"] > 0, -streams["sft_weight"] * logprob, loss), metrics
