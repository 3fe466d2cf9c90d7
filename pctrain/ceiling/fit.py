"""Ceiling of an RL run: the posterior of a sigmoid in compute, with an interval and a verdict.

The model (arXiv 2512.11470, section 3; the sigmoid law is from arXiv 2510.13786), with scores in percent and EFLOPs x
from the switch point:

    y_i = L + D s(x_i) + n_i,   s(x) = 1 / (1 + (x / C)^-B),   L = P_sft + eps,   A = L + D <= highest possible score

The noise n is AR(1) along the points with sd sigma and coefficient rho, and the given P_sft is itself a noisy reading.
The posterior is summed exactly on a grid (posterior.py). No optimizer runs, so there are no local optima, and every
call returns the same digits. Collapses and isolated outliers are removed first (collapse.py).
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from pctrain.ceiling import checks, collapse
from pctrain.ceiling.curve import Curve
from pctrain.ceiling.posterior import Draws, Priors, draw, rise

# The verdict of a fit is the first of these that holds:
# * collapsed: fitted to the points before the collapse.
# * too_short: fewer than MIN_POINTS points used.
# * flat: no gain seen. RL may not have begun to work, so this is not a ceiling.
# * identified: the estimate can be used.
# * lower_bound: only the lower end of the interval carries information.
VERDICTS = ("identified", "lower_bound", "flat", "too_short", "collapsed")
MIN_POINTS = 12
# Flat: the median and the 95% quantile of the gain seen so far are below these (points), or below the noise sd and
# twice the noise sd where those are larger.
FLAT_GAIN, FLAT_GAIN_HIGH = 1.0, 2.0
# Identified: the ceiling is within NEAR points of a_post with probability SURE, and at least SHARE of the rise D has
# been seen (5% quantile).
IDENTIFIED_NEAR = 1.5
IDENTIFIED_SURE = 0.89
IDENTIFIED_SHARE = 0.35
LOW, MEDIAN, HIGH = QUANTILES = (0.05, 0.5, 0.95)
PRIORS = Priors()
# Nearly uninformative priors (B, C and D over orders of magnitude) measure how much of an estimate the prior decides.
WIDE = Priors(b_log_sd=1.0, c_log_sd=2.0, d_scales=(30.0,), d_weights=(1.0,))


@dataclass(frozen=True)
class Points:
    """The checked points of one RL curve and what is known about their errors (points; None: not given)."""

    x: np.ndarray
    y: np.ndarray
    p_sft: float
    score_se: float | None
    p_sft_se: float | None
    max_score: float

    @classmethod
    def checked(
        cls,
        eflops: ArrayLike,
        scores: ArrayLike,
        p_sft: float,
        score_se: float | None,
        p_sft_se: float | None,
        max_score: float,
    ) -> Points:
        """Check the arguments of `fit_ceiling`. A UserError names the one that is wrong."""
        x, y, p_sft = checks.curve(eflops, scores, p_sft, max_score)
        checks.standard_error(score_se, "ceiling fit: score_se")
        checks.standard_error(p_sft_se, "ceiling fit: p_sft_se")
        return cls(x, y, p_sft, score_se, p_sft_se, max_score)

    def draws(self, used: np.ndarray, priors: Priors) -> Draws:
        """Draw from the posterior given the `used` points (a mask)."""
        return draw(
            self.x[used],
            self.y[used],
            self.p_sft,
            self.seen(used),
            self.max_score,
            self.score_se,
            self.p_sft_se,
            priors,
        )

    def seen(self, used: np.ndarray) -> float:
        """Return the largest x among the `used` points, or among all points if none is used."""
        return float(self.x[used].max(initial=0.0)) or float(self.x.max())


@dataclass(frozen=True)
class Fit:
    """The posterior of one curve.

    Scores are in percent, compute in EFLOPs from the switch point. `low` and `high` are the 5% and 95% quantiles.
    """

    a_post: float
    a_post_low: float
    a_post_high: float
    pl_rl: float
    c_mid: float
    b: float
    eps: float  # posterior mean (the median is 0 unless a jump at the switch point is likely)
    p_sft: float
    verdict: str
    n_points: int
    n_used: int  # 0 for a curve that collapses at once: its numbers are then the prior's
    collapsed_at: float | None
    share_seen: float  # share of the rise D seen up to the largest x used; 5% quantile
    sigma: float  # noise sd of a score, points
    used: np.ndarray = field(repr=False)  # bool [n_points]: the points that the fit saw
    draws: Draws = field(repr=False)
    points: Points = field(repr=False)

    @functools.cached_property
    def prior_shift(self) -> float:
        """The points that a_post moves by under wide priors of B, C and D: how much the priors decide."""
        draws = self.points.draws(self.used, WIDE)
        return float(draws.quantiles(draws.l + draws.d, (MEDIAN,))[0]) - self.a_post

    def curve(self, x: ArrayLike) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return the median, 5% and 95% quantiles, each [n], of the noiseless score at `x` [n] EFLOPs.

        `x` is 0 or more; at 0 the noiseless score is L.
        """
        return self._quantiles(self.draws.scores(np.asarray(x, dtype=np.float64)))

    def predict(self, x: ArrayLike) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return the same quantiles as `curve` for one measured score at `x`, noise included.

        The score is cut to [0, the highest possible score]. Beyond the last used point the noise still remembers that
        point's noise, with rho to the power of the distance in (median) steps.
        """
        at = np.asarray(x, dtype=np.float64)
        seen, scores = self.points.x[self.used], self.points.y[self.used]
        noise = self.draws.sigma * self.draws.noise
        if len(seen) > 1:
            steps = (at[:, None] - seen[-1]) / np.median(np.diff(seen))
            memory = np.where(steps > 0, self.draws.rho ** np.maximum(steps, 0.0), 0.0)
            last = scores[-1] - self.draws.scores(seen[-1:])[0]
            noise = memory * last + np.sqrt(1 - memory**2) * noise
        return self._quantiles(np.clip(self.draws.scores(at) + noise, 0.0, self.points.max_score))

    def _quantiles(self, scores: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        low, median, high = np.array([self.draws.quantiles(row, QUANTILES) for row in scores]).reshape(-1, 3).T
        return median, low, high

    def as_row(self, dataset: str, start_step: int | None) -> dict[str, Any]:
        """Return the row of fits.json: plain JSON values, with the keys of docs/reference/ceilings.md."""
        keys = (
            "p_sft",
            "a_post",
            "a_post_low",
            "a_post_high",
            "pl_rl",
            "c_mid",
            "b",
            "eps",
            "verdict",
            "n_points",
            "n_used",
            "collapsed_at",
            "prior_shift",
        )
        return {"dataset": dataset, "start_step": start_step} | {key: getattr(self, key) for key in keys}


def fit_ceiling(
    eflops: ArrayLike,
    scores: ArrayLike,
    p_sft: float,
    *,
    score_se: float | None = None,
    p_sft_se: float | None = None,
    max_score: float = checks.MAX_SCORE,
) -> Fit:
    """Fit one RL curve of one point or more.

    Args:
        eflops: [n], from the switch point, increasing.
        scores: [n], percent.
        p_sft: score at the switch point, percent.
        score_se: standard error of one score in points, if known.
        p_sft_se: standard error of `p_sft` in points, if known.
        max_score: the highest possible score, if wrong labels or the verifier's limits keep it below 100.
    """
    points = Points.checked(eflops, scores, p_sft, score_se, p_sft_se, max_score)
    p_sft = points.p_sft
    used, onset = collapse.used_points(points.y, p_sft, score_se)
    draws = points.draws(used, PRIORS)

    a_low, a_post, a_high = draws.quantiles(draws.l + draws.d, QUANTILES)
    c_mid, b, sigma = (draws.quantiles(values, (MEDIAN,))[0] for values in (draws.c, draws.b, draws.sigma))
    share = rise(np.array(points.seen(used)), draws.b, draws.c)  # [DRAWS], of the rise D seen so far
    share_low = draws.quantiles(share, (LOW,))[0]
    gain, gain_high = draws.quantiles(draws.l + draws.d * share - p_sft, (MEDIAN, HIGH))

    if onset is not None:
        verdict = "collapsed"
    elif used.sum() < MIN_POINTS:
        verdict = "too_short"
    elif gain < max(FLAT_GAIN, sigma) and gain_high < max(FLAT_GAIN_HIGH, 2 * sigma):
        verdict = "flat"
    elif _near(draws, a_post) >= IDENTIFIED_SURE and share_low >= IDENTIFIED_SHARE:
        verdict = "identified"
    else:
        verdict = "lower_bound"
    return Fit(
        a_post=float(a_post),
        a_post_low=float(a_low),
        a_post_high=float(a_high),
        pl_rl=float(a_post - p_sft),
        c_mid=float(c_mid),
        b=float(b),
        eps=float(draws.weight @ draws.eps),
        p_sft=p_sft,
        verdict=verdict,
        n_points=len(points.x),
        n_used=int(used.sum()),
        collapsed_at=None if onset is None else float(points.x[onset]),
        share_seen=float(share_low),
        sigma=float(sigma),
        used=used,
        draws=draws,
        points=points,
    )


def _near(draws: Draws, a_post: float) -> float:
    """Return the probability that the ceiling is within IDENTIFIED_NEAR points of `a_post`."""
    return float(draws.weight @ (np.abs(draws.l + draws.d - a_post) <= IDENTIFIED_NEAR))


def fit_curve(curve: Curve, points: int | None = None) -> Fit:
    """Run `fit_ceiling` on the first `points` points of a curve (None: all), with the errors that the curve states."""
    return fit_ceiling(
        curve.eflops[:points],
        curve.scores[:points],
        curve.p_sft,
        score_se=curve.score_se,
        p_sft_se=curve.p_sft_se,
        max_score=curve.max_score,
    )
