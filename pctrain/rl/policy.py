"""What the group-relative algorithms share: advantages within a group, and the clipped per-token loss."""

from __future__ import annotations

import numpy as np
import torch


def group_advantages(rewards: np.ndarray, std_normalise: bool) -> np.ndarray:
    """rewards [prompts, group] -> advantages [prompts, group], float64: R - mean R, divided by the group's standard deviation if asked.

    PAPER.md 5. The standard deviation is the sample one (group - 1), as in verl and TRL; a group of equal rewards gives zeros.
    """
    rewards = np.asarray(rewards, dtype=np.float64)
    centred = rewards - rewards.mean(1, keepdims=True)
    if not std_normalise:
        return centred
    return centred / (rewards.std(1, ddof=1, keepdims=True) + 1e-6)


def clipped_loss(logprob: torch.Tensor, streams: dict[str, torch.Tensor], clip_low: float, clip_high: float):
    """-min(r A, clip(r, 1 - clip_low, 1 + clip_high) A) per token (PAPER.md 5), r = exp(logprob - old_logprob).

    logprob [n], streams["advantage"] [n], streams["old_logprob"] [n] -> (loss [n], {"ratio": [n], "clip_share": [n]}).
    Without `old_logprob` the policy is the one that sampled: r is exactly 1 and only its gradient counts.
    """
    advantage = streams["advantage"]
    ratio = torch.exp(logprob - streams.get("old_logprob", logprob.detach()))
    plain, clipped = ratio * advantage, ratio.clamp(1 - clip_low, 1 + clip_high) * advantage
    metrics = {"ratio": ratio.detach(), "clip_share": (clipped < plain).float().detach()}
    return -torch.minimum(plain, clipped), metrics
