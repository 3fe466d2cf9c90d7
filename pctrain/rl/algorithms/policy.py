"""Functions of the group-relative algorithms: rewards and advantages of a group (NumPy), and the loss of one token (PyTorch)."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch

from pctrain.data.rows import Row
from pctrain.rl import mismatch
from pctrain_kernels import policy_loss

# Metrics that are 0 on an expert's tokens, so that their means over the others are quotients of sums.
OF_SAMPLED = ("ratio", "clip_share", "dual_clip_share", "is_weight", *mismatch.OF_SAMPLED)


def group_advantages(rewards: np.ndarray, std_normalise: bool, leave_one_out: bool = False) -> np.ndarray:
    """rewards [..., group] -> advantages [..., group], float64: R - mean R, divided by the group's standard deviation if asked.

    PAPER.md 5. The standard deviation is the sample one (group - 1), as in verl and TRL; a group of equal rewards gives zeros.
    `leave_one_out` (RLOO): R - mean of the others = (R - mean R) group / (group - 1).
    """
    rewards = np.asarray(rewards, dtype=np.float64)
    size = rewards.shape[-1]
    centred = rewards - rewards.mean(-1, keepdims=True)
    if leave_one_out:
        centred = centred * (size / (size - 1))
    return centred / (rewards.std(-1, ddof=1, keepdims=True) + 1e-6) if std_normalise else centred


def overlong_share(lengths: np.ndarray, max_response: int, buffer: int) -> np.ndarray:
    """Tokens of a response [n] -> 0 up to max_response - buffer, from there linearly to 1 at max_response.

    DAPO's soft overlong punishment (arXiv 2503.14476, equation 13), to be taken off the reward. Without a buffer: zeros.
    """
    return np.clip((lengths - (max_response - buffer)) / buffer, 0, 1) if buffer else np.zeros(len(lengths))


def sampled(row: Row) -> np.ndarray:
    """bool [L]: the tokens that the policy sampled and that are trained on."""
    return (row.weights > 0) & (row.streams.get("expert", 0) == 0)


def finite(logprobs: list[float] | None, problem_id: str) -> list[float]:
    """Log-probs of the engine, for NaN has a meaning of its own in the streams."""
    if logprobs is None or not np.isfinite(logprobs).all():
        raise ValueError(
            f"{problem_id}: rl.is_correction needs a log-prob of every sampled token, and the engine gave none, or no number"
        )
    return logprobs


def with_sequence_weight(row: Row, cap: float) -> Row:
    """Adds `is_weight`: min(pi_old / pi_rollout of all that was sampled, cap) there, 1 on other tokens."""
    own = sampled(row)
    log_ratio = (row.streams["old_logprob"][own] - row.streams["rollout_logprob"][own]).sum(dtype=np.float64)
    weight = np.float32(np.exp(min(log_ratio, np.log(cap))))
    return replace(row, streams={**row.streams, "is_weight": np.where(own, weight, np.float32(1))})


def surrogate_loss(
    logprob: torch.Tensor,
    entropy: torch.Tensor,
    streams: dict[str, torch.Tensor],
    *,
    clip_low: float | None,
    clip_high: float | None,
    dual_clip: float | None = None,
    kl_coef: float = 0.0,
    kl_kind: str = "k3",
    entropy_coef: float = 0.0,
    is_cap: float | None = None,
    shaping: float | None = None,
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """-w min(r A, clip(r, 1 - clip_low, 1 + clip_high) A) + kl_coef KL - entropy_coef H per token (`pctrain_kernels.policy_loss`).

    logprob [n], entropy [n], streams {name: [n]} as in `rl.algorithm` -> (loss [n], metrics {name: [n]}). Without `old_logprob` the policy
    is the one that sampled: r is exactly 1 and only its gradient counts. `is_cap`: w = min(pi_old / pi_rollout, is_cap) of each token, 1
    where nothing was sampled. `shaping`: on tokens of the stream `expert` r is pi / (pi + shaping), without clip.
    """
    advantage = streams["advantage"]
    given = {name: streams[name] for name in ("old_logprob", "ref_logprob") if name in streams}
    if is_cap is not None:
        given["rollout_logprob"] = rollout_or_old(logprob, streams)
    if "is_weight" in streams:  # at least 0, so it may stand within the minimum
        advantage = advantage * streams["is_weight"]
    if shaping is not None:
        given["expert_mask"] = streams["expert"] > 0
    loss, found = policy_loss(
        logprob, entropy, advantage=advantage, **given, clip_low=clip_low, clip_high=clip_high, dual_clip=dual_clip, kl_coef=kl_coef,
        kl_kind=kl_kind, entropy_coef=entropy_coef, is_cap=is_cap, expert_shaping=shaping,
    )  # fmt: skip
    metrics = {
        "ratio": found["ratio"],
        "clip_share": found["clipped_low"] + found["clipped_high"],
        "entropy": found["entropy"],
    }
    metrics |= {name: found[name] for name in ("kl", "is_weight") if name in found}
    if "is_weight" in streams:
        metrics["is_weight"] = streams["is_weight"]
    if dual_clip is not None:
        metrics["dual_clip_share"] = found["clipped_dual"]
    if "expert" in streams:
        metrics["expert"] = streams["expert"]
        metrics |= {name: metrics[name] * (streams["expert"] == 0) for name in OF_SAMPLED if name in metrics}
    return loss, metrics


def rollout_or_old(logprob: torch.Tensor, streams: dict[str, torch.Tensor]) -> torch.Tensor:
    """The engine's log-probs; where it sampled nothing the learner's own, so that the weight is 1 there."""
    rollout = streams["rollout_logprob"]
    return torch.where(rollout.isnan(), streams.get("old_logprob", logprob.detach()), rollout)
