"""The SFT validation loss, exactly: the sum of the token losses over all validation tokens, divided by their number.

It is the control signal of the framework, so it depends neither on packing, nor on micro-batches, nor on how many ranks
share the work.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from pctrain.core import Learner
from pctrain.data.trajectories import Trajectories
from pctrain.distributed import parallel
from pctrain.distributed.health import watchdog

PACKS = 16  # packs of each rank per pass: the log-probs of that many are in memory at once


@dataclass(frozen=True)
class MeanLoss:
    """A mean loss in nats per token, and its standard error with the trajectories as independent draws."""

    loss: float
    se: float
    tokens: int


@dataclass(frozen=True)
class ValidationLoss:
    """The validation loss over all tokens (`whole`), over trajectories (`per_sample`) and by source.

    `per_sample` is the mean over trajectories of each one's token mean. `sources` has, for each source, the mean over
    its own tokens.
    """

    whole: MeanLoss
    per_sample: MeanLoss
    sources: dict[str, MeanLoss]
    sequences: int

    def metrics(self) -> dict[str, float]:
        """Return the values for metrics.jsonl; those of the sources only if there are several."""
        metrics = {
            "val_loss": self.whole.loss,
            "val_loss_se": self.whole.se,
            "val_tokens": self.whole.tokens,
            "val_sample_loss": self.per_sample.loss,
            "val_sample_loss_se": self.per_sample.se,
        }
        if len(self.sources) > 1:
            for name, mean in self.sources.items():
                metrics |= {f"val_loss/{name}": mean.loss, f"val_loss_se/{name}": mean.se}
        return metrics


@watchdog.phase("validation")
def validation_loss(learner: Learner, trajectories: Trajectories, token_budget: int) -> ValidationLoss:
    """Return the validation loss. Every trajectory counts once, whatever its source's weight. Collective."""
    sums = np.empty(len(trajectories))
    counts = trajectories.loss_tokens.astype(np.float64)
    tokens_per_pass = PACKS * token_budget * parallel.data_parallel()[1]
    for indices in _parts(trajectories.lengths, tokens_per_pass):
        logprobs = learner.logprobs(trajectories.select(indices.tolist()), token_budget, trained_only=True)
        # A log-prob is 0 on tokens that are not trained on, so the sum is over the loss tokens.
        for index, logprob in zip(indices, logprobs, strict=True):
            sums[index] = -logprob.sum(dtype=np.float64)
    masks = {name: trajectories.source == number for number, name in enumerate(trajectories.names)}
    means = sums / counts
    return ValidationLoss(
        whole=ratio(sums, counts),
        per_sample=MeanLoss(float(means.mean()), ratio(means, np.ones(len(means))).se, int(counts.sum())),
        sources={name: ratio(sums[mask], counts[mask]) for name, mask in masks.items()},
        sequences=len(trajectories),
    )


def ratio(sums: np.ndarray, counts: np.ndarray) -> MeanLoss:
    """Return the mean L = sum S_i / sum n_i of loss sums S_i [n] over n_i [n] tokens, with its standard error.

    The error is the ratio estimator's, with residuals S_i - L n_i (Cochran, Sampling Techniques, equation 6.13, without
    the correction for a finite population).
    """
    n = len(sums)
    tokens = float(counts.sum())
    loss = float(sums.sum() / tokens)
    se = math.sqrt(float(((sums - loss * counts) ** 2).sum()) * n / max(1, n - 1)) / tokens
    return MeanLoss(loss, se, int(tokens))


def _parts(lengths: np.ndarray, tokens: int) -> Iterator[np.ndarray]:
    """Yield consecutive indices of about `tokens` tokens at a time."""
    part = np.cumsum(lengths) // tokens
    return iter(np.split(np.arange(len(lengths)), np.flatnonzero(np.diff(part)) + 1))
