"""Correlations of few points, with intervals that do not pretend."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import permutations
from typing import Literal

import numpy as np
from scipy import special, stats

CONFIDENCE = 0.95
LEAST = 4  # points: Fisher's interval needs n - 3 above 0
EXACT = 7  # points, up to which all orders are tried for the p-value


@dataclass(frozen=True)
class Correlation:
    """`value` in [-1, 1], None where one of the two is constant. `low`, `high`: 95 %, None for fewer than LEAST points.
    `p`: share of all orders of the points whose correlation is as far from 0, None for more than EXACT points."""

    value: float | None
    low: float | None
    high: float | None
    p: float | None

    def __str__(self) -> str:
        if self.value is None:
            return "not defined (constant values)"
        interval = "no interval" if self.low is None else f"{self.low:+.2f} to {self.high:+.2f}"
        return f"{self.value:+.2f} ({interval}{'' if self.p is None else f', p {self.p:.2g}'})"


def correlate(x: Sequence[float], y: Sequence[float], kind: Literal["pearson", "spearman"]) -> Correlation:
    """Of points (x [n], y [n]). The interval is Fisher's, tanh(atanh r +- z / sqrt(n - 3)); of Spearman's the variance is 1.06 / (n - 3)
    (Fieller, Hartley & Pearson 1957). A perfect correlation of few points has the interval of one at r = 1 - 1 / (2 n^2): no interval of
    width 0."""
    a, b = (np.asarray(values, dtype=np.float64) for values in (x, y))
    if kind == "spearman":
        a, b = stats.rankdata(a), stats.rankdata(b)
    n = len(a)
    if n < 2 or a.std() == 0 or b.std() == 0:
        return Correlation(None, None, None, None)
    r = float(np.clip(np.corrcoef(a, b)[0, 1], -1.0, 1.0))
    p = None
    if n <= EXACT:
        every = np.array(list(permutations(b - b.mean()))) @ (a - a.mean()) / (n * a.std() * b.std())
        p = float(np.mean(np.abs(every) >= abs(r) - 1e-9))
    if n < LEAST:
        return Correlation(r, None, None, p)
    most = 1 - 1 / (2 * n * n)
    half = special.ndtri((1 + CONFIDENCE) / 2) * math.sqrt((1.06 if kind == "spearman" else 1.0) / (n - 3))
    middle = math.atanh(max(-most, min(most, r)))
    low, high = math.tanh(middle - half), math.tanh(middle + half)
    return Correlation(r, min(low, r), max(high, r), p)
