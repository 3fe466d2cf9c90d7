"""Correlations of a few points, with intervals as wide as so few points require."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import permutations
from typing import Literal

import numpy as np
from scipy import special, stats

CONFIDENCE = 0.95
MIN_POINTS = 4  # Fisher's interval needs n - 3 > 0
MAX_PERMUTED_POINTS = 7  # the p-value enumerates all orders up to this many points


@dataclass(frozen=True)
class Correlation:
    """A correlation coefficient with its 95% interval and permutation p-value.

    `value` is in [-1, 1], or None if x or y is constant. `low` and `high` are None for fewer than MIN_POINTS points.
    `p` is the share of all orders of the points whose correlation is at least as far from 0. It is None for more than
    MAX_PERMUTED_POINTS points.
    """

    value: float | None
    low: float | None
    high: float | None
    p: float | None

    def __str__(self) -> str:
        if self.value is None:
            return "not defined (constant values)"
        interval = "no interval" if self.low is None else f"{self.low:+.2f} to {self.high:+.2f}"
        p_value = "" if self.p is None else f", p {self.p:.2g}"
        return f"{self.value:+.2f} ({interval}{p_value})"


def correlate(x: Sequence[float], y: Sequence[float], kind: Literal["pearson", "spearman"]) -> Correlation:
    """Correlate the points (x [n], y [n]).

    The interval is Fisher's, tanh(atanh r +- z / sqrt(n - 3)). For Spearman the variance is 1.06 / (n - 3) (Fieller,
    Hartley & Pearson 1957). A perfect correlation gets the interval of r = 1 - 1 / (2 n^2), because an interval of
    width 0 would claim too much.
    """
    a, b = (np.asarray(values, dtype=np.float64) for values in (x, y))
    if kind == "spearman":
        a, b = stats.rankdata(a), stats.rankdata(b)
    n = len(a)
    if n < 2 or a.std() == 0 or b.std() == 0:
        return Correlation(None, None, None, None)
    r = float(np.clip(np.corrcoef(a, b)[0, 1], -1.0, 1.0))
    p = None
    if n <= MAX_PERMUTED_POINTS:
        permuted = np.array(list(permutations(b - b.mean()))) @ (a - a.mean()) / (n * a.std() * b.std())
        p = float(np.mean(np.abs(permuted) >= abs(r) - 1e-9))
    if n < MIN_POINTS:
        return Correlation(r, None, None, p)
    largest = 1 - 1 / (2 * n * n)
    half_width = special.ndtri((1 + CONFIDENCE) / 2) * math.sqrt((1.06 if kind == "spearman" else 1.0) / (n - 3))
    center = math.atanh(max(-largest, min(largest, r)))
    low, high = math.tanh(center - half_width), math.tanh(center + half_width)
    return Correlation(r, min(low, r), max(high, r), p)
