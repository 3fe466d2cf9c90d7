"""Curves of known ceilings: what they are drawn from, and the fits of many of them.

x = 1 .. n points, evenly spaced. B is log-normal (median 1.3, log sd 0.5), the gain D uniform in 2 to 14 points, P_sft uniform in 55 to 80
and read with sd 0.5, eps 0 or (one in five) half-normal of scale 1.5. The noise is AR(1) along the points; `heavy` has innovations of
Student's t of 3 degrees of freedom, at the same sd. None of these is the prior of the estimator.
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
AR, NOISE, POINTS, TAILS = (0.0, 0.2, 0.4, 0.6), (0.3, 0.5, 0.8), (20, 40, 80), ("normal", "heavy")
MAX_D = 14.0


@dataclass(frozen=True)
class Truth:
    """How one curve was made. `range_c` is the largest x over C; `gain` is D, what the ceiling lies above L."""

    seed: tuple[int, ...]
    range_c: float
    ar: float
    noise: float
    points: int
    tails: str
    no_gain: bool = False

    def curve(self) -> tuple[np.ndarray, np.ndarray, float, float, float]:
        """x [n], scores [n], the reading of P_sft, the ceiling A and D."""
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
    truth: Truth
    a: float
    gain: float
    a_post: float
    low: float
    high: float
    verdict: str

    @property
    def covered(self) -> bool:
        return self.low <= self.a <= self.high

    @property
    def error(self) -> float:
        return abs(self.a_post - self.a)

    @property
    def width(self) -> float:
        return self.high - self.low

    @property
    def right(self) -> bool:
        """Whether the verdict is true: `collapsed` and `too_short` never are, of curves that are long and do not collapse."""
        return {"identified": self.error <= 1.5, "lower_bound": self.low <= self.a, "flat": self.gain <= 1.5}.get(
            self.verdict, False
        )


def truths(ranges: Iterable[float], draws: int, seed: int, no_gain: bool = False) -> list[Truth]:
    """`draws` curves of each range / C, over all combinations of AR, noise, points and tails in turn, in a shuffled order."""
    cells = [(ar, noise, points, tails) for ar in AR for noise in NOISE for points in POINTS for tails in TAILS]
    made = []
    for at, range_c in enumerate(ranges):
        order = np.random.default_rng((seed, at, int(no_gain))).permutation(-(-draws // len(cells)) * len(cells))[
            :draws
        ]
        made += [
            Truth((seed, at, int(no_gain), i), range_c, *cells[int(cell) % len(cells)], no_gain)
            for i, cell in enumerate(order)
        ]
    return made


def outcome(truth: Truth) -> Outcome:
    x, scores, p_sft, a, gain = truth.curve()
    fit = fit_ceiling(x, scores, p_sft)
    return Outcome(truth, a, gain, fit.a_post, fit.a_post_low, fit.a_post_high, fit.verdict)


def outcomes(curves: Iterable[Truth], workers: int | None = None) -> Iterator[Outcome]:
    """Fits of all curves, in order, over the cores."""
    return map_in_order(outcome, curves, workers)
