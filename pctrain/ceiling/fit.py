"""Ceiling of an RL run: the posterior of a sigmoid in compute, with an interval and a verdict.

Model (arXiv 2512.11470, section on the framework; sigmoid law of arXiv 2510.13786), scores in percent against EFLOPs x from the joint:

    y_i = L + D s(x_i) + n_i,   s(x) = 1 / (1 + (x / C)^-B),   L = P_sft + eps,   A = L + D <= the highest score there can be,

where n is AR(1) along the points with sd sigma and coefficient rho, and the given P_sft is itself a noisy reading. The posterior is summed
exactly on a grid (posterior.py). No optimiser runs, so there are no local optima, and every call gives the same digits.
Collapses and isolated outliers are cut before (collapse.py).
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from pctrain.ceiling import checks, collapse
from pctrain.ceiling.curve import Curve
from pctrain.ceiling.posterior import Draws, Priors, draw, rise

VERDICTS = ("identified", "lower_bound", "flat", "too_short", "collapsed")
MIN_POINTS = 12  # fewer used points: too_short
FLAT_GAIN, FLAT_GAIN_HIGH = (
    1.0,
    2.0,
)  # points; noise sd and twice that where larger: median and 95 % quantile of the gain seen so far
# Identified: the ceiling is this SURE to lie this NEAR to a_post (points), and at least this SHARE of the rise D is seen (5 % quantile).
IDENTIFIED_NEAR, IDENTIFIED_SURE, IDENTIFIED_SHARE = 1.5, 0.89, 0.35
LOW, MEDIAN, HIGH = QUANTILES = (0.05, 0.5, 0.95)
# For the shift of the estimate where the priors say little: B, C and D over orders of magnitude.
WIDE = Priors(b_log_sd=1.0, c_log_sd=2.0, d_scales=(30.0,), d_weights=(1.0,))


@dataclass(frozen=True)
class Points:
    """What a fit is made from, checked: the points of one RL curve, and what is known of their errors (points; None: not given)."""

    x: np.ndarray
    y: np.ndarray
    p_sft: float
    score_se: float | None
    p_sft_se: float | None
    max_score: float

    def draws(self, used: np.ndarray, priors: Priors) -> Draws:
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
        """The largest x used; where none is, of all."""
        return float(self.x[used].max(initial=0.0)) or float(self.x.max())


@dataclass(frozen=True)
class Fit:
    """Posterior of one curve. Scores in percent, compute in EFLOPs from the joint; `low` and `high` are the 5 and 95 % quantiles."""

    a_post: float
    a_post_low: float
    a_post_high: float
    pl_rl: float
    c_mid: float
    b: float
    eps: float  # posterior mean (the median is 0 unless a jump at the joint is likely)
    p_sft: float
    verdict: str
    n_points: int
    n_used: int
    collapsed_at: float | None
    share_seen: float  # of the rise D, up to the largest x used; 5 % quantile
    sigma: float  # noise sd of a score, points
    used: np.ndarray = field(repr=False)  # bool [n_points]: the points that the fit saw
    draws: Draws = field(repr=False)
    points: Points = field(repr=False)

    @functools.cached_property
    def prior_shift(self) -> float:
        """Points that a_post moves by when the priors of B, C and D are made wide: what of the estimate is theirs, not the data's."""
        draws = self.points.draws(self.used, WIDE)
        return float(draws.quantiles(draws.l + draws.d, (MEDIAN,))[0]) - self.a_post

    def curve(self, x: Sequence[float]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Median, 5 % and 95 % quantiles, each [n], of the noiseless score at `x` [n] EFLOPs, 0 or more; at 0 that is L."""
        return self._quantiles(self.draws.scores(np.asarray(x, dtype=np.float64)))

    def predict(self, x: Sequence[float]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """As `curve`, of a score that is measured at `x`, once, with its noise: within 0 and the highest score.

        Beyond the last point used the noise still remembers that point's: with rho to the power of the distance in (median) steps.
        """
        x = np.asarray(x, dtype=np.float64)
        seen, scores = self.points.x[self.used], self.points.y[self.used]
        noise = self.draws.sigma * self.draws.noise
        if len(seen) > 1:
            steps = (x[:, None] - seen[-1]) / np.median(np.diff(seen))
            memory = np.where(steps > 0, self.draws.rho ** np.maximum(steps, 0.0), 0.0)
            last = scores[-1] - self.draws.scores(seen[-1:])[0]
            noise = memory * last + np.sqrt(1 - memory**2) * noise
        return self._quantiles(np.clip(self.draws.scores(x) + noise, 0.0, self.points.max_score))

    def _quantiles(self, scores: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        low, median, high = np.array([self.draws.quantiles(row, QUANTILES) for row in scores]).reshape(-1, 3).T
        return median, low, high

    def as_row(self, dataset: str, start_step: int | None) -> dict:
        """The row of fits.json: plain JSON values, the keys of docs/contracts.md."""
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
    eflops: Sequence[float],
    scores: Sequence[float],
    p_sft: float,
    *,
    score_se: float | None = None,
    p_sft_se: float | None = None,
    max_score: float = checks.MAX_SCORE,
    priors: Priors = Priors(),
) -> Fit:
    """Fit one RL curve: `eflops` [n] from the joint, increasing, and `scores` [n] in percent; `p_sft` is the score at the joint.

    `score_se`, `p_sft_se`: standard errors of one score and of P_sft in points, where known; `max_score`: the highest score there can be,
    where wrong labels or a verifier's limits keep it below 100. Any number of points from one on is fitted;
    what they do not tell shows in the interval and in `verdict`: `collapsed` (fitted to the points before it) > `too_short` (fewer than
    12 points used) > `flat` (no gain seen, which may mean that RL has not begun to work: not a ceiling) > `identified` > `lower_bound`
    (only the lower end of the interval means anything). A curve that collapses at once leaves no point to fit (`n_used` 0): its
    numbers are the prior's.
    """
    x, y, p_sft = checks.curve(eflops, scores, p_sft, max_score)
    checks.standard_error(score_se, "ceiling fit: score_se")
    checks.standard_error(p_sft_se, "ceiling fit: p_sft_se")
    points = Points(x, y, p_sft, score_se, p_sft_se, max_score)
    used, onset = collapse.used_points(y, p_sft, score_se)
    draws = points.draws(used, priors)

    a = draws.l + draws.d
    a_low, a_post, a_high = draws.quantiles(a, QUANTILES)
    sure = float(draws.weight @ (np.abs(a - a_post) <= IDENTIFIED_NEAR))
    c_mid, b, sigma = (draws.quantiles(values, (MEDIAN,))[0] for values in (draws.c, draws.b, draws.sigma))
    share = rise(np.array(points.seen(used)), draws.b, draws.c)
    share_low = draws.quantiles(share, (LOW,))[0]
    gain, gain_high = draws.quantiles(draws.l + draws.d * share - p_sft, (MEDIAN, HIGH))

    if onset is not None:
        verdict = "collapsed"
    elif used.sum() < MIN_POINTS:
        verdict = "too_short"
    elif gain < max(FLAT_GAIN, sigma) and gain_high < max(FLAT_GAIN_HIGH, 2 * sigma):
        verdict = "flat"
    elif sure >= IDENTIFIED_SURE and share_low >= IDENTIFIED_SHARE:
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
        n_points=len(x),
        n_used=int(used.sum()),
        collapsed_at=None if onset is None else float(x[onset]),
        share_seen=float(share_low),
        sigma=float(sigma),
        used=used,
        draws=draws,
        points=points,
    )


def fit_curve(curve: Curve, points: int | None = None) -> Fit:
    """`fit_ceiling` of a curve with all that it states of itself; of its first `points` points, where given."""
    return fit_ceiling(
        curve.eflops[:points],
        curve.scores[:points],
        curve.p_sft,
        score_se=curve.score_se,
        p_sft_se=curve.p_sft_se,
        max_score=curve.max_score,
    )
