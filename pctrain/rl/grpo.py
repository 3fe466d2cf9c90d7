"""GRPO (PAPER.md 5): minimise the token mean of -min(r A, clip(r, 1 - eps, 1 + eps) A), A the group-relative advantage.

Every prompt counts, also those whose rollouts all earned the same: their advantage is 0.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from pctrain.config import RLConfig
from pctrain.rl.policy import clipped_loss, group_advantages


@dataclass(frozen=True)
class GRPO:
    clip: float
    std_normalise: bool
    dynamic_sampling = False

    @classmethod
    def from_config(cls, rl: RLConfig) -> GRPO:
        return cls(clip=rl.clip_low, std_normalise=rl.std_normalise)

    def advantages(self, rewards: np.ndarray) -> np.ndarray:
        """rewards [prompts, group] -> [prompts, group]."""
        return group_advantages(rewards, self.std_normalise)

    def loss(self, logprob: torch.Tensor, entropy: torch.Tensor, streams: dict[str, torch.Tensor]):
        """logprob [n], entropy [n] -> (loss [n], metrics {name: [n]})."""
        return clipped_loss(logprob, entropy, streams, self.clip, self.clip)
