"""The SFT validation loss, exactly: the sum of the token losses over all validation tokens, divided by their number.

It is the control signal of the framework, so it depends neither on packing, nor on micro-batches, nor on how many ranks share the work.
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

PACKS = 16  # of each rank in one pass over a part of the set: log-probs of that much are in memory


@dataclass(frozen=True)
class MeanLoss:
    """Nats a token, and its standard error with the trajectories as independent draws."""

    loss: float
    se: float
    tokens: int


@dataclass(frozen=True)
class ValidationLoss:
    """`whole`: over all tokens. `per_sample`: the mean over trajectories of each one's own mean; `sources`: by name, over their tokens."""

    whole: MeanLoss
    per_sample: MeanLoss
    sources: dict[str, MeanLoss]
    sequences: int

    def metrics(self) -> dict[str, float]:
        """The keys of docs/contracts.md; those of the sources where there are several."""
        found = {
            "val_loss": self.whole.loss,
            "val_loss_se": self.whole.se,
            "val_tokens": self.whole.tokens,
            "val_sample_loss": self.per_sample.loss,
            "val_sample_loss_se": self.per_sample.se,
        }
        if len(self.sources) > 1:
            for name, mean in self.sources.items():
                found |= {f"val_loss/{name}": mean.loss, f"val_loss_se/{name}": mean.se}
        return found


@watchdog.phase("validation")
def validation_loss(learner: Learner, trajectories: Trajectories, token_budget: int) -> ValidationLoss:
    """Collective. Every trajectory counts once, whatever its source's weight."""
    sums, counts = np.empty(len(trajectories)), trajectories.loss_tokens.astype(np.float64)
    for indices in _parts(trajectories.lengths, PACKS * token_budget * parallel.data_parallel()[1]):
        # A trajectory's log-prob is 0 where it is not trained on: the sum is over its loss tokens.
        for index, logprob in zip(
            indices, learner.logprobs(trajectories.select(indices), token_budget, trained_only=True), strict=True
        ):
            sums[index] = -logprob.sum(dtype=np.float64)
    of_source = {name: trajectories.source == number for number, name in enumerate(trajectories.names)}
    means = sums / counts
    return ValidationLoss(
        whole=ratio(sums, counts),
        per_sample=MeanLoss(float(means.mean()), ratio(means, np.ones(len(means))).se, int(counts.sum())),
        sources={name: ratio(sums[mine], counts[mine]) for name, mine in of_source.items()},
        sequences=len(trajectories),
    )


def ratio(sums: np.ndarray, counts: np.ndarray) -> MeanLoss:
    """Loss sums S_i [n] over n_i [n] tokens -> L = sum S_i / sum n_i, with the ratio estimator's standard error: residuals S_i - L n_i.

    (Cochran, Sampling Techniques, eq. 6.13, without the correction for a finite population.)
    """
    n, tokens = len(sums), float(counts.sum())
    loss = float(sums.sum() / tokens)
    se = math.sqrt(float(((sums - loss * counts) ** 2).sum()) * n / max(1, n - 1)) / tokens
    return MeanLoss(loss, se, int(tokens))


def _parts(lengths: np.ndarray, tokens: int) -> Iterator[np.ndarray]:
    """Consecutive indices, about so many tokens at a time."""
    part = np.cumsum(lengths) // tokens
    return iter(np.split(np.arange(len(lengths)), np.flatnonzero(np.diff(part)) + 1))
