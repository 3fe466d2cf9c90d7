"""Forecasts from a fitted curve: the RL compute that a score takes, and the score that a budget buys.

Both assume the model, a curve that continues as one sigmoid. They do not foresee a collapse, or a second rise as some
published runs show.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from pctrain.ceiling.fit import QUANTILES, Fit
from pctrain.ceiling.paper_fit import PaperFit


@dataclass(frozen=True)
class Reach:
    """RL compute, in EFLOPs from the switch point, at which the noiseless curve reaches `score` (percent).

    The compute quantiles are None where no compute is enough with that probability. The 95% quantile is therefore None
    whenever `probability` is 0.95 or less.
    """

    score: float
    probability: float | None  # that any compute is enough; None: the method `paper` has no probabilities
    eflops: float | None  # median
    eflops_low: float | None  # 5% quantile
    eflops_high: float | None  # 95% quantile


@dataclass(frozen=True)
class AtBudget:
    """The score, in percent, at `eflops` from the switch point: of the noiseless curve, and of one measurement.

    The method `paper` gives no interval: its bounds are None.
    """

    eflops: float
    score: float  # median
    low: float | None  # 5% quantile
    high: float | None  # 95% quantile
    measured_low: float | None  # with the noise of a measurement
    measured_high: float | None


def reach(fit: Fit | PaperFit, score: float) -> Reach:
    """Estimate the RL compute that `score` takes; 0 EFLOPs if the curve begins at `score` or above."""
    if isinstance(fit, PaperFit):
        return Reach(float(score), None, _paper_eflops(fit, score), None, None)
    draws = fit.draws
    eflops = _eflops_at(score, draws.l, draws.d, draws.b, draws.c)
    probability = float(draws.weight @ np.isfinite(eflops))
    low, median, high = (_quantile(fit, eflops, quantile) for quantile in QUANTILES)
    return Reach(float(score), min(probability, 1.0), median, low, high)


def _paper_eflops(fit: PaperFit, score: float) -> float | None:
    if fit.b is None or fit.c_mid is None:
        return None
    level = fit.p_sft + fit.eps
    eflops = float(_eflops_at(score, level, fit.a_post - level, fit.b, fit.c_mid))
    return eflops if np.isfinite(eflops) else None


def _eflops_at(
    score: float, level: np.ndarray | float, gain: np.ndarray | float, b: np.ndarray | float, c: np.ndarray | float
) -> np.ndarray:
    """Solve level + gain s(x) = score for x; infinite where the curve never gets there."""
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        share = (score - np.asarray(level)) / np.asarray(gain)
        odds = np.where(score <= np.asarray(level), 0.0, np.where(share < 1, share / (1 - share), np.inf))
        return c * odds ** (1 / np.asarray(b))


def _quantile(fit: Fit, eflops: np.ndarray, quantile: float) -> float | None:
    """Return a quantile over the draws, or None if it is infinite.

    The quantile is one of the draws. It is not interpolated, because a neighbor may be 0 or infinite.
    """
    order = np.argsort(eflops, kind="stable")
    index = int(np.searchsorted(np.cumsum(fit.draws.weight[order]), quantile))
    value = float(eflops[order[min(index, len(order) - 1)]])
    return value if np.isfinite(value) else None


def at_budgets(fit: Fit | PaperFit, eflops: Sequence[float]) -> list[AtBudget]:
    """Forecast the scores at `eflops` from the switch point, each 0 or more."""
    if isinstance(fit, PaperFit):
        return [
            AtBudget(float(x), float(score), None, None, None, None)
            for x, score in zip(eflops, fit.curve(eflops), strict=True)
        ]
    score, low, high = fit.curve(eflops)
    _, measured_low, measured_high = fit.predict(eflops)
    columns = zip(eflops, score, low, high, measured_low, measured_high, strict=True)
    return [AtBudget(*(float(value) for value in values)) for values in columns]


@dataclass(frozen=True)
class HeldOut:
    """How well a fit of the first points of a curve predicts the rest.

    `rmse` and `inside` are None if no point is held out. `inside` is also None for the method `paper`.
    """

    points: int  # held out, without those after a collapse of the whole curve
    rmse: float | None  # of the predicted median, points
    inside: float | None  # share of the points in the predictive 90% interval


def held_out(fit: Fit | PaperFit, eflops: np.ndarray, scores: np.ndarray) -> HeldOut:
    """Compare a fit with points it did not see: `eflops` and `scores` [n], n >= 0."""
    if not len(eflops):
        return HeldOut(0, None, None)
    inside = None
    if isinstance(fit, PaperFit):
        predicted = fit.curve(eflops)
    else:
        predicted, low, high = fit.predict(eflops)
        inside = float(np.mean((low <= scores) & (scores <= high)))
    return HeldOut(len(eflops), float(np.sqrt(np.mean((scores - predicted) ** 2))), inside)
