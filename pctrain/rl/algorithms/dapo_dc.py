"""DAPO_dc (PAPER.md 4, 5; arXiv 2503.14476): GRPO with dynamic sampling (d) and clip-higher (c), token-mean loss, no KL, no entropy bonus.

Dynamic sampling drops prompts whose rollouts are all right or all wrong, and samples on until the batch is full; clip-higher gives
unlikely tokens more room to grow: clip(r, 1 - clip_low, 1 + clip_high) with clip_high > clip_low. A is divided by the group's standard
deviation.
"""

from __future__ import annotations

import torch

from pctrain.rl.algorithms.base import Algorithm


class DAPOdc(Algorithm):
    dynamic_sampling = True
    paper_std = True
    paper_entropy_coef = 0.0

    def loss(self, logprob: torch.Tensor, entropy: torch.Tensor, streams: dict[str, torch.Tensor]):
        return self.surrogate(logprob, entropy, streams, clip_low=self.rl.clip_low, clip_high=self.rl.clip_high)
