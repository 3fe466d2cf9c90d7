"""Ceiling of an RL run: the posterior of a sigmoid in compute, with an interval and a verdict.

Model (arXiv 2512.11470, section on the framework; sigmoid law of arXiv 2510.13786), scores in percent against EFLOPs x from the joint:

    y_i = L + D s(x_i) + n_i,   s(x) = 1 / (1 + (x / C)^-B),   L = P_sft + eps,   A = L + D <= 100,

where n is AR(1) along the points with sd sigma and coefficient rho, and the given P_sft is itself a noisy reading. The posterior is summed
exactly on a grid (posterior.py). No optimiser runs, so there are no local optima, and every call gives the same digits.
Collapses and isolated outliers are cut before (collapse.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from pctrain.ceiling import collapse
from pctrain.ceiling.posterior import CEILING, Draws, Priors, draw, rise
from pctrain.errors import UserError

VERDICTS = ("identified", "lower_bound", "flat", "too_short", "collapsed")
MIN_POINTS = 12  # fewer used points: too_short
FLAT_GAIN, FLAT_GAIN_HIGH = 1.0, 2.0  # points; noise sd and twice that where larger: median and 95 % quantile of the gain seen so far
IDENTIFIED_WIDTH, IDENTIFIED_SHARE = 4.0, 0.6  # widest 90 % interval, points; least share of the rise D seen (its 5 % quantile)
NOISE_FLOOR = 0.25  # points: the least sd that outliers and collapses are judged by, where score_se is not given
CALM_POINTS = 7  # the noise of a possible collapse is judged by the first half of the curve, by no fewer points than this
LOW, MEDIAN, HIGH = QUANTILES = (0.05, 0.5, 0.95)


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

    def curve(self, x: Sequence[float]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Median, 5 % and 95 % quantiles, each [n], of the noiseless score at `x` [n] EFLOPs, 0 or more; at 0 that is L."""
        scores = self.draws.scores(np.asarray(x, dtype=np.float64))
        low, median, high = np.array([self.draws.quantiles(row, QUANTILES) for row in scores]).reshape(-1, 3).T
        return median, low, high

    def as_row(self, dataset: str, start_step: int) -> dict:
        """The row of fits.json: plain JSON values, the keys of docs/contracts.md."""
        keys = ("p_sft", "a_post", "a_post_low", "a_post_high", "pl_rl", "c_mid", "b", "eps", "verdict", "n_points", "n_used",
                "collapsed_at")
        return {"dataset": dataset, "start_step": start_step} | {key: getattr(self, key) for key in keys}


def fit_ceiling(eflops: Sequence[float], scores: Sequence[float], p_sft: float, *, score_se: float | None = None,
                p_sft_se: float | None = None, priors: Priors = Priors()) -> Fit:
    """Fit one RL curve: `eflops` [n] from the joint, increasing, and `scores` [n] in percent; `p_sft` is the score at the joint.

    `score_se`, `p_sft_se`: standard errors of one score and of P_sft in points, where known. Any number of points from one on is fitted;
    what they do not tell shows in the interval and in `verdict`: `collapsed` (fitted to the points before it) > `too_short` (fewer than
    12 points used) > `flat` (no gain seen, which may mean that RL has not begun to work: not a ceiling) > `identified` > `lower_bound`
    (only the lower end of the interval means anything). A curve that collapses at once leaves no point to fit (`n_used` 0): its
    numbers are the prior's.
    """
    x, y, p_sft = _checked(eflops, scores, p_sft, score_se, p_sft_se)
    used, onset = _used_points(y, p_sft, NOISE_FLOOR if score_se is None else score_se)
    x_seen = float(x[used].max(initial=0.0)) or float(x.max())
    draws = draw(x[used], y[used], p_sft, x_seen, score_se, p_sft_se, priors)

    a_low, a_post, a_high = draws.quantiles(draws.l + draws.d, QUANTILES)
    c_mid, b, sigma = (draws.quantiles(values, (MEDIAN,))[0] for values in (draws.c, draws.b, draws.sigma))
    share = rise(np.array(x_seen), draws.b, draws.c)
    share_low = draws.quantiles(share, (LOW,))[0]
    gain, gain_high = draws.quantiles(draws.l + draws.d * share - p_sft, (MEDIAN, HIGH))

    if onset is not None:
        verdict = "collapsed"
    elif used.sum() < MIN_POINTS:
        verdict = "too_short"
    elif gain < max(FLAT_GAIN, sigma) and gain_high < max(FLAT_GAIN_HIGH, 2 * sigma):
        verdict = "flat"
    elif a_high - a_low <= IDENTIFIED_WIDTH and share_low >= IDENTIFIED_SHARE:
        verdict = "identified"
    else:
        verdict = "lower_bound"
    return Fit(
        a_post=float(a_post), a_post_low=float(a_low), a_post_high=float(a_high), pl_rl=float(a_post - p_sft), c_mid=float(c_mid),
        b=float(b), eps=float(draws.weight @ draws.eps), p_sft=p_sft, verdict=verdict, n_points=len(x), n_used=int(used.sum()),
        collapsed_at=None if onset is None else float(x[onset]), share_seen=float(share_low), sigma=float(sigma), used=used, draws=draws)


def _used_points(y: np.ndarray, p_sft: float, floor: float) -> tuple[np.ndarray, int | None]:
    """Mask [n] of the points to fit, and the index of the first point of a collapse (None: there is none)."""
    sd = collapse.noise_sd(y, floor)
    kept = np.flatnonzero(~collapse.isolated(y, sd))
    # After a collapse the scores are wild; judged by the whole curve's noise it could hide itself.
    calm = min(sd, collapse.noise_sd(y[:max(CALM_POINTS, len(y) // 2)], floor))
    onset = collapse.onset(y[kept], p_sft, calm)
    used = np.zeros(len(y), dtype=bool)
    used[kept[:onset]] = True
    return used, None if onset is None else int(kept[onset])


def _checked(eflops: Sequence[float], scores: Sequence[float], p_sft: float, score_se: float | None,
             p_sft_se: float | None) -> tuple[np.ndarray, np.ndarray, float]:
    try:
        x, y, p_sft = np.asarray(eflops, dtype=np.float64), np.asarray(scores, dtype=np.float64), float(p_sft)
    except (TypeError, ValueError) as error:
        raise UserError(f"ceiling fit: eflops, scores and p_sft must be numbers ({error})") from None
    if x.ndim != 1 or x.shape != y.shape or not len(x):
        raise UserError(f"ceiling fit: need as many scores as eflops, one or more; found {y.shape} and {x.shape}")
    if not (np.isfinite(x).all() and np.isfinite(y).all() and np.isfinite(p_sft)):
        raise UserError("ceiling fit: eflops, scores and p_sft must be finite; leave out the points that were not measured")
    if (x < 0).any() or (np.diff(x) <= 0).any() or x[-1] == 0:
        raise UserError("ceiling fit: eflops must be 0 or more, increase from point to point and end above 0")
    if (y < 0).any() or (y > CEILING).any() or not 0 <= p_sft <= CEILING:
        raise UserError("ceiling fit: scores and p_sft must be in percent, 0 to 100")
    for name, value in (("score_se", score_se), ("p_sft_se", p_sft_se)):
        if value is not None and not (np.isfinite(value) and value > 0):
            raise UserError(f"ceiling fit: {name} must be a standard error above 0 in points, or None where unknown; found {value!r}")
    return x, y, p_sft
