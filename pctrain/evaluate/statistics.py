"""Scores of benchmarks with 95% intervals. The sampled unit is the problem; its own samples only say how hard it is.

A problem counts with one value: its mean over samples, or its pass@k. Values of n problems are n independent draws,
whatever the number of samples behind each (Miller, "Adding Error Bars to Evals", arXiv 2411.00640, section 2.2,
clustered errors).

* One benchmark: Agresti and Coull's interval (The American Statistician 52, 1998). z^2 = 3.84 pseudo-problems join the
  n, half of them right and half wrong, and the mean of all n + z^2 gets a normal interval. With one sample per problem
  this is exactly their interval; with more, the variance is that between problems. None right of n gives 0 with an
  upper bound of about 4.6 / n, never 0 +- 0.
* A difference of two models on the same problems: Agresti and Min's interval (Statistics in Medicine 24, 2005), which
  adds two pseudo-problems to the paired differences: half of one at -1, half at +1, one at 0.
* Means over benchmarks: MOVER (Zou and Donner, Statistics in Medicine 27, 2008), which combines the distances to the
  bounds as one would combine standard errors, so the bounds stay as asymmetric as those of the parts.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

Z = 1.959963984540054  # 97.5% quantile of the normal distribution


@dataclass(frozen=True)
class Estimate:
    """A share, or a difference of shares, with its 95% interval."""

    value: float
    low: float
    high: float

    @property
    def se(self) -> float:
        """Standard error: half the interval divided by z."""
        return (self.high - self.low) / (2 * Z)

    def percent(self) -> dict[str, float]:
        """Return score, low and high in percent."""
        return {"score": 100 * self.value, "low": 100 * self.low, "high": 100 * self.high}


def pass_at_k(samples: int, right: int, k: int) -> float:
    """Return the probability that at least one of k samples is right: 1 - C(n - c, k) / C(n, k), for 1 <= k <= n.

    The estimator is unbiased: Chen et al., "Evaluating Large Language Models Trained on Code", arXiv 2107.03374,
    equation 1. Whole numbers avoid the rounding of their product.
    """
    if not 1 <= k <= samples:
        raise ValueError(f"pass@{k} of {samples} samples")
    return 1 - math.comb(samples - right, k) / math.comb(samples, k)


def powers_of_two(most: int) -> list[int]:
    """Return 1, 2, 4, ... up to `most`, and `most` itself."""
    powers = [2**i for i in range(most.bit_length()) if 2**i <= most]
    return powers if powers[-1] == most else [*powers, most]


def mean(values: ArrayLike) -> Estimate:
    """Return the mean over one benchmark, of a value in [0, 1] for each problem [n]."""
    values = np.asarray(values, dtype=np.float64)
    extra = Z * Z
    centre, spread = _normal(values.sum() + extra / 2, (values**2).sum() + extra / 2, len(values) + extra)
    return Estimate(float(values.mean()), max(0.0, centre - spread), min(1.0, centre + spread))


def difference(values: ArrayLike, against: ArrayLike) -> Estimate:
    """Return the mean of `values` - `against`, both [n] over the same problems in the same order."""
    differences = np.asarray(values, dtype=np.float64) - np.asarray(against, dtype=np.float64)
    centre, spread = _normal(differences.sum(), (differences**2).sum() + 1, len(differences) + 2)
    return Estimate(float(differences.mean()), max(-1.0, centre - spread), min(1.0, centre + spread))


def combined(parts: Sequence[Estimate], weights: Sequence[float]) -> Estimate:
    """Return the weighted mean of independent benchmarks."""
    shares = np.asarray(weights, dtype=np.float64) / sum(weights)
    value = float(sum(share * part.value for share, part in zip(shares, parts, strict=True)))
    below = math.sqrt(sum((share * (part.value - part.low)) ** 2 for share, part in zip(shares, parts, strict=True)))
    above = math.sqrt(sum((share * (part.high - part.value)) ** 2 for share, part in zip(shares, parts, strict=True)))
    return Estimate(value, value - below, value + above)


def _normal(total: float, squares: float, count: float) -> tuple[float, float]:
    """Return (mean, z times its standard error) of `count` values with this sum and this sum of squares."""
    centre = total / count
    return centre, Z * math.sqrt(max(0.0, squares / count - centre**2) / count)
