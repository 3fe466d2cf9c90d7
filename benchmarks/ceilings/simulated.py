"""Simulated curves of known ceilings, and the fits of many of them.

x is 1 .. n points, evenly spaced. B is log-normal (median 1.3, log sd 0.5), the gain D uniform in 2 to 14 points. P_sft
is uniform in 55 to 80 and read with sd 0.5; eps is 0 or, for one curve in five, half-normal of scale 1.5. The noise is
AR(1) along the points; `heavy` has innovations from a Student's t with 3 degrees of freedom, at the same sd. None of
these is the prior of the estimator.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np

from pctrain.ceiling.fit import fit_ceiling
from pctrain.ceiling.posterior import rise
from pctrain.data.workers import map_in_order

SEED = 20261121  # fixed before the estimator was tuned; tuning used other seeds
RANGES = (1.0, 1.5, 3.0, 6.0, 12.0, 30.0)  # largest x / C
RANGES_BELOW = (0.3, 0.5, 0.8)
AR = (0.0, 0.2, 0.4, 0.6)
NOISE = (0.3, 0.5, 0.8)
POINTS = (20, 40, 80)
TAILS = ("normal", "heavy")
MAX_D = 14.0


@dataclass(frozen=True)
class Truth:
    """The parameters of one simulated curve. `range_c` is the largest x over C."""

    seed: tuple[int, ...]
    range_c: float
    ar: float
    noise: float
    points: int
    tails: str
    no_gain: bool = False

    def curve(self) -> tuple[np.ndarray, np.ndarray, float, float, float]:
        """Return x [n], scores [n], the reading of P_sft, the ceiling A, and the gain D of the ceiling over L."""
        rng = np.random.default_rng(self.seed)
        b = 1.3 * np.exp(0.5 * rng.normal())
        gain = rng.uniform(0.0, 1.0) if self.no_gain else rng.uniform(2.0, MAX_D)
        p_sft = rng.uniform(55.0, 80.0)
        eps = abs(rng.normal()) * 1.5 if rng.uniform() < 0.2 and not self.no_gain else 0.0
        x = np.arange(1, self.points + 1, dtype=np.float64)
        level = p_sft + eps
        scores = level + gain * rise(x, b, x[-1] / self.range_c) + self._errors(rng)
        return x, np.clip(scores, 0, 100), p_sft + 0.5 * rng.normal(), level + gain, gain

    def _errors(self, rng: np.random.Generator) -> np.ndarray:
        z = rng.standard_t(3, self.points) / np.sqrt(3.0) if self.tails == "heavy" else rng.normal(size=self.points)
        errors = np.empty(self.points)
        errors[0] = z[0]
        for i in range(1, self.points):
            errors[i] = self.ar * errors[i - 1] + np.sqrt(1 - self.ar**2) * z[i]
        return self.noise * errors


@dataclass(frozen=True)
class Outcome:
    """The fit of a simulated curve next to its truth."""

    truth: Truth
    a: float
    gain: float
    a_post: float
    low: float
    high: float
    verdict: str

    @property
    def covered(self) -> bool:
        """True if the 90% interval contains the true ceiling."""
        return self.low <= self.a <= self.high

    @property
    def error(self) -> float:
        """Distance of the estimate to the true ceiling, points."""
        return abs(self.a_post - self.a)

    @property
    def width(self) -> float:
        """Width of the 90% interval, points."""
        return self.high - self.low

    @property
    def right(self) -> bool:
        """True if the verdict is right. `collapsed` and `too_short` never are: no curve collapses or is short."""
        true = {"identified": self.error <= 1.5, "lower_bound": self.low <= self.a, "flat": self.gain <= 1.5}
        return true.get(self.verdict, False)


def truths(ranges: Iterable[float], draws: int, seed: int, no_gain: bool = False) -> list[Truth]:
    """Return `draws` curves of each range / C: all combinations of AR, noise, points and tails in turn, shuffled."""
    cells = [(ar, noise, points, tails) for ar in AR for noise in NOISE for points in POINTS for tails in TAILS]
    rounds = -(-draws // len(cells))
    truths = []
    for place, range_c in enumerate(ranges):
        group = (seed, place, int(no_gain))
        order = np.random.default_rng(group).permutation(rounds * len(cells))[:draws]
        truths += [Truth((*group, i), range_c, *cells[int(cell) % len(cells)], no_gain) for i, cell in enumerate(order)]
    return truths


def outcome(truth: Truth) -> Outcome:
    """Fit one simulated curve."""
    x, scores, p_sft, a, gain = truth.curve()
    fit = fit_ceiling(x, scores, p_sft)
    return Outcome(truth, a, gain, fit.a_post, fit.a_post_low, fit.a_post_high, fit.verdict)


def outcomes(curves: Iterable[Truth], workers: int | None = None) -> Iterator[Outcome]:
    """Fit all curves on all cores and yield the outcomes in order."""
    return map_in_order(outcome, curves, workers)
