"""What the group-relative algorithms share: advantages within a group, and the clipped per-token loss."""

from __future__ import annotations

import numpy as np
import torch
from pctrain_kernels import policy_loss


def group_advantages(rewards: np.ndarray, std_normalise: bool) -> np.ndarray:
    """rewards [prompts, group] -> advantages [prompts, group], float64: R - mean R, divided by the group's standard deviation if asked.

    PAPER.md 5. The standard deviation is the sample one (group - 1), as in verl and TRL; a group of equal rewards gives zeros.
    """
    rewards = np.asarray(rewards, dtype=np.float64)
    centred = rewards - rewards.mean(1, keepdims=True)
    if not std_normalise:
        return centred
    return centred / (rewards.std(1, ddof=1, keepdims=True) + 1e-6)


def clipped_loss(
    logprob: torch.Tensor, entropy: torch.Tensor, streams: dict[str, torch.Tensor], clip_low: float, clip_high: float
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """-min(r A, clip(r, 1 - clip_low, 1 + clip_high) A) per token (PAPER.md 5), r = exp(logprob - old_logprob).

    logprob [n], entropy [n], streams["advantage"] [n], streams["old_logprob"] [n] -> (loss [n], metrics {name: [n]}).
    Without `old_logprob` the policy is the one that sampled: r is exactly 1 and only its gradient counts.
    """
    loss, metrics = policy_loss(logprob, entropy, **streams, clip_low=clip_low, clip_high=clip_high)
    clip_share = metrics["clipped_low"] + metrics["clipped_high"]
    return loss, {"ratio": metrics["ratio"], "clip_share": clip_share, "entropy": metrics["entropy"]}
