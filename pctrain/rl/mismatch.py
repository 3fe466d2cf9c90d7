"""Learner against engine: how far their log-probs of the sampled tokens lie apart, and weights that correct for it.

Two implementations round differently, so a batch sampled by the engine is slightly off the learner's policy even in the first update. The
engine returns the log-prob of every token it samples, at the sampling temperature; as the stream `rollout_logprob` it meets the learner's
in the training forward pass itself, which costs no pass of its own.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

import numpy as np
import torch
from pctrain_kernels import TokenLoss

from pctrain.data.rows import Row
from pctrain.rollout import Completion

Correction = Literal["none", "token", "sequence"]
Streams = dict[str, torch.Tensor]

MEAN, MAX, KL, BEYOND_2X = "mismatch/mean", "max/mismatch", "mismatch/kl", "mismatch/beyond_2x"
SEQUENCE_WEIGHT = "is_weight"


def correction(setting: Correction | None, dtype: str) -> Correction:
    """What `rl.is_correction` comes to: where it is not given, "token" in bfloat16 and "none" in float32.

    On a small model ratios of 0.87 to 1.13 were measured in bfloat16; in float32 they are 1 to 1e-5, and weighting by them is noise.
    """
    if setting is not None:
        return setting
    return "token" if dtype == "bfloat16" else "none"


def with_rollout_logprobs(rows: Sequence[Row], completions: Sequence[Completion | None]) -> list[Row]:
    """Adds the stream `rollout_logprob`: the completion's log-probs on the last tokens of its row, 0 before them.

    None stands for a row without sampled tokens (an expert's). ValueError for a completion sampled without log-probs.
    """
    return [_with_rollout_logprob(row, completion) for row, completion in zip(rows, completions, strict=True)]


def _with_rollout_logprob(row: Row, completion: Completion | None) -> Row:
    values = np.zeros(len(row), np.float32)
    if completion is not None:
        if completion.logprobs is None:
            raise ValueError("a completion without log-probs: sample it with logprobs=True")
        values[len(row) - len(completion.logprobs):] = completion.logprobs
    return replace(row, streams={**row.streams, "rollout_logprob": values})


def with_sequence_weights(rows: Sequence[Row], cap: float) -> list[Row]:
    """Truncated importance sampling of whole sequences: w = min(exp(sum over sampled tokens of old_logprob - rollout_logprob), cap).

    Reads the streams `old_logprob`, `rollout_logprob` and, where there is one, `expert_mask` (such tokens are not sampled). Every clipped
    surrogate is linear in w >= 0, min(r w A, clip(r) w A) = w min(r A, clip(r) A), so the stream `advantage` is multiplied by it on
    sampled tokens; the stream `is_weight` tells it to the metrics. A constant of the update: it needs the log-probs of the whole sequence,
    so one pass before it.
    """
    return [_with_sequence_weight(row, cap) for row in rows]


def _with_sequence_weight(row: Row, cap: float) -> Row:
    streams = row.streams
    sampled = row.weights > 0
    if "expert_mask" in streams:
        sampled &= streams["expert_mask"] == 0
    difference = (streams["old_logprob"].astype(np.float64) - streams["rollout_logprob"])[sampled].sum()
    weight = cap if difference >= math.log(cap) else math.exp(difference)  # exp of a long sequence's sum would overflow
    weights = np.where(sampled, np.float32(weight), np.float32(1))
    advantage = streams["advantage"] * weights
    return replace(row, streams={**streams, "advantage": advantage, SEQUENCE_WEIGHT: np.where(sampled, weights, np.float32(0))})


def measured(loss: TokenLoss, correction: Correction) -> TokenLoss:
    """`loss` with the metrics of the mismatch, where there is a stream `rollout_logprob`; without one it is `loss`.

    The learner's log-prob is `old_logprob` where the rows have it (with several updates a step the policy moves away from the one that
    sampled), else the one of this very forward pass. With d = learner - engine, per token:

        mismatch/mean        |d|
        max/mismatch         |d|, reduced by its maximum
        mismatch/kl          exp(d) - 1 - d, the k3 estimate of KL(engine || learner) (http://joschu.net/blog/kl-approx.html)
        mismatch/beyond_2x   1 where the ratio is above 2 or below 1/2
        is_weight            the sequence's weight, with "sequence" (with "token" `policy_loss` tells its own)

    All are 0 where the stream `expert_mask` is set. `loss` gets `rollout_logprob` under "token" alone, and never `is_weight`.
    """

    def token_loss(logprob: torch.Tensor, entropy: torch.Tensor | None, streams: Streams) -> tuple[torch.Tensor, Streams]:
        hidden = {SEQUENCE_WEIGHT} if correction == "token" else {SEQUENCE_WEIGHT, "rollout_logprob"}
        value, metrics = loss(logprob, entropy, {name: stream for name, stream in streams.items() if name not in hidden})
        if "rollout_logprob" in streams:
            metrics = metrics | _metrics(streams.get("old_logprob", logprob.detach()), streams)
        if SEQUENCE_WEIGHT in streams:
            metrics = metrics | {SEQUENCE_WEIGHT: streams[SEQUENCE_WEIGHT]}
        return value, metrics

    return token_loss


def _metrics(learner: torch.Tensor, streams: Streams) -> Streams:
    difference = learner - streams["rollout_logprob"]
    if "expert_mask" in streams:
        difference = difference.masked_fill(streams["expert_mask"].bool(), 0)
    distance = difference.abs()
    return {
        MEAN: distance,
        MAX: distance,
        KL: difference.expm1() - difference,
        BEYOND_2X: (distance > math.log(2)).to(distance.dtype),
    }
