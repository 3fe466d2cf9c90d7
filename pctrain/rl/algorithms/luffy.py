"""LUFFY (PAPER.md 4, 5; arXiv 2504.14945): rollouts and the expert's trajectory in one group.

Minimise the mean, over the tokens of both, of -r A on rollouts and -r_hat A on the expert's tokens; r = pi / pi_old without clip,
r_hat = pi / (pi + 0.1): the gradient is largest where the policy finds the expert's token unlikely, not impossible.
A = R - mean R over the group - 1 rollouts and the expert, whose R is 1. No KL.
"""

from __future__ import annotations

import torch

from pctrain.rl.algorithms.base import Algorithm

SHAPING = 0.1  # gamma of the paper's f(x) = x / (x + gamma)


class LUFFY(Algorithm):
    needs_expert = True
    expert_in_group = True

    def loss(self, logprob: torch.Tensor, entropy: torch.Tensor, streams: dict[str, torch.Tensor]):
        return self.surrogate(logprob, entropy, streams, clip_low=None, clip_high=None, shaping=SHAPING)
