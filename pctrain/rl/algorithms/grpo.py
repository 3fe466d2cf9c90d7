"""GRPO (arXiv 2402.03300; arXiv 2512.11470): the base that every other algorithm varies. Minimize the token mean of

    -w min(r A, clip(r, 1 - clip_low, 1 + clip_low) A) + kl_coef KL - entropy_coef H

    A = R - mean of R over the group of one prompt    R: reward of the response
    r = pi / pi_old                                   pi: policy being trained; pi_old: policy of this step's start
    w = min(pi_old / pi_rollout, is_cap)              pi_rollout: the engine's policy; w = 1 without is_correction

Every prompt counts, also one whose rollouts all earned the same reward: its advantages are 0.
"""

from __future__ import annotations

import numpy as np
import torch

from pctrain.rl.algorithms.base import METRICS_OF_SAMPLED, Algorithm, Streams


class GRPO(Algorithm):
    """Group-relative policy optimization."""

    def advantages(self, rewards: np.ndarray) -> np.ndarray:
        """Return R - mean R over the group, rewards and advantages [..., group] in float64.

        With `leave_one_out` (RLOO, arXiv 2402.14740) the mean is that of the other members. With `std_normalise` the
        result is divided by the sample standard deviation (group - 1), as in verl and TRL.
        """
        size = rewards.shape[-1]
        centered = rewards - rewards.mean(-1, keepdims=True)
        if self.options.leave_one_out:
            centered = centered * (size / (size - 1))
        if self.options.std_normalise:
            centered = centered / (rewards.std(-1, ddof=1, keepdims=True) + 1e-6)
        return centered

    def ratio(self, logprob: torch.Tensor, streams: Streams) -> torch.Tensor:
        """Return r = pi / pi_old per token; without `old_logprob` the policy has not moved, and r is 1."""
        return (logprob - streams.get("old_logprob", logprob.detach())).exp()

    def clip(self, ratio: torch.Tensor) -> torch.Tensor:
        """Return the ratio within the bounds beyond which it earns nothing."""
        return ratio.clamp(1 - self.options.clip_low, 1 + self.options.clip_low)

    def loss(self, logprob: torch.Tensor, entropy: torch.Tensor, streams: Streams) -> tuple[torch.Tensor, Streams]:
        """Return the loss [n] and metrics {name: [n]} of n tokens, from log-probs, entropies and streams, each [n]."""
        advantage = streams["advantage"]
        if "is_weight" in streams:  # not negative, so it may be a factor inside the minimum
            advantage = advantage * streams["is_weight"]
        ratio = self.ratio(logprob, streams)
        unclipped = ratio * advantage
        surrogate = torch.minimum(unclipped, self.clip(ratio) * advantage)
        metrics = {"ratio": ratio, "clip_share": surrogate < unclipped, "entropy": entropy}
        if self.options.dual_clip is not None:
            bounded = torch.maximum(surrogate, self.options.dual_clip * advantage).where(advantage < 0, surrogate)
            metrics["dual_clip_share"] = bounded > surrogate
            surrogate = bounded
        if self.corrects:
            metrics["is_weight"] = self.importance_weight(logprob, streams)
        if self.options.is_correction == "token":
            surrogate = metrics["is_weight"] * surrogate
        loss = -surrogate

        if self.options.kl_coef or "ref_logprob" in streams:
            difference = streams["ref_logprob"] - logprob
            # k1 is part of the reward; then k3 is only a metric.
            kl = difference.square() / 2 if self.options.kl_kind == "k2" else difference.expm1() - difference
            metrics["kl"] = kl
            if self.options.kl_coef and not self.options.kl_in_reward:
                loss = loss + self.options.kl_coef * kl
        if self.options.entropy_coef:
            loss = loss - self.options.entropy_coef * entropy
        return loss, self._report_sampled(metrics, logprob, streams)

    def importance_weight(self, logprob: torch.Tensor, streams: Streams) -> torch.Tensor:
        """Return w per token (truncated importance sampling), 1 on tokens that the engine did not sample."""
        if self.options.is_correction == "sequence":
            return streams["is_weight"]
        old = streams.get("old_logprob", logprob.detach())
        rollout = streams["rollout_logprob"]
        rollout = torch.where(rollout.isnan(), old, rollout)
        return (old - rollout).exp().clamp(max=self.options.is_cap)

    def _report_sampled(self, metrics: Streams, logprob: torch.Tensor, streams: Streams) -> Streams:
        """Return the metrics detached, as numbers; those of a ratio or a weight are 0 on an expert's tokens."""
        numbers = {name: value.detach().to(logprob.dtype) for name, value in metrics.items()}
        if "expert" in streams:
            for name in METRICS_OF_SAMPLED:
                if name in numbers:
                    numbers[name] = numbers[name] * (streams["expert"] == 0)
            numbers["expert"] = streams["expert"]
        return numbers
