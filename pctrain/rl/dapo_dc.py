"""DAPO_dc (PAPER.md 4, 5): GRPO with dynamic sampling (d) and clip-higher (c), token-mean loss, no KL.

Dynamic sampling drops prompts whose rollouts are all right or all wrong, and samples on until the batch is full; clip-higher gives
unlikely tokens more room to grow: clip(r, 1 - clip_low, 1 + clip_high) with clip_high > clip_low.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from pctrain.config import RLConfig
from pctrain.rl.policy import clipped_loss, group_advantages


@dataclass(frozen=True)
class DAPO:
    clip_low: float
    clip_high: float
    std_normalise: bool
    dynamic_sampling = True

    @classmethod
    def from_config(cls, rl: RLConfig) -> DAPO:
        return cls(clip_low=rl.clip_low, clip_high=rl.clip_high, std_normalise=rl.std_normalise)

    def advantages(self, rewards: np.ndarray) -> np.ndarray:
        """rewards [prompts, group] -> [prompts, group]."""
        return group_advantages(rewards, self.std_normalise)

    def loss(self, logprob: torch.Tensor, entropy: torch.Tensor, streams: dict[str, torch.Tensor]):
        """logprob [n], entropy [n] -> (loss [n], metrics {name: [n]})."""
        return clipped_loss(logprob, entropy, streams, self.clip_low, self.clip_high)
