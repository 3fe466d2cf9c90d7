"""LUFFY (arXiv 2504.14945; arXiv 2512.11470): GRPO with the expert's trajectory as the last member of each group.

Minimize the mean, over the tokens of both, of -r A on rollouts and -r_hat A on the expert's tokens:

    r     = pi / pi_old, without a clip
    r_hat = pi / (pi + 0.1), whose gradient is largest where the policy finds the expert's token unlikely
    A     = R - mean of R over the group - 1 rollouts and the expert, whose R is 1

No KL.
"""

from __future__ import annotations

import torch

from pctrain.rl.algorithms.base import Streams
from pctrain.rl.algorithms.grpo import GRPO
from pctrain.rl.algorithms.options import LUFFYOptions

SHAPING = 0.1  # gamma of f(x) = x / (x + gamma) in arXiv 2504.14945


class LUFFY(GRPO):
    """GRPO with a shaped, unclipped ratio on the expert's tokens."""

    Options = LUFFYOptions

    def ratio(self, logprob: torch.Tensor, streams: Streams) -> torch.Tensor:
        """Return r on sampled tokens and r_hat on the expert's."""
        expert = streams["expert"] > 0
        # An expert's token may be very unlikely under pi_old: exp(logprob - old_logprob) must not overflow there.
        old = torch.where(expert, logprob.detach(), streams.get("old_logprob", logprob.detach()))
        return torch.where(expert, shaped(logprob), (logprob - old).exp())

    def clip(self, ratio: torch.Tensor) -> torch.Tensor:
        """Return the ratio itself: LUFFY does not clip."""
        return ratio


def shaped(logprob: torch.Tensor) -> torch.Tensor:
    """Return r_hat = pi / (pi + SHAPING) per token."""
    probability = logprob.exp()
    return probability / (probability + SHAPING)
