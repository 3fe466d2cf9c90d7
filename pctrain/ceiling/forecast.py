"""What the posterior of a curve says beyond its points: the RL compute that a score takes, and the score that a budget buys.

Both are of the model: a curve that goes on as a sigmoid. A collapse, or a second rise as some published runs show, is not foreseen.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from pctrain.ceiling.fit import QUANTILES, Fit
from pctrain.ceiling.paper_fit import PaperFit


@dataclass(frozen=True)
class Reach:
    """RL compute, EFLOPs from the joint, at which the noiseless curve comes to `score` (percent)."""

    score: float
    probability: float | None  # that it ever does; None: of the method `paper`, which knows none
    eflops: float | None  # median; None: with this probability no compute is enough
    eflops_low: float | None  # 5 % quantile; None likewise
    eflops_high: float | None  # 95 % quantile; None likewise, so wherever `probability` is 0.95 or less


@dataclass(frozen=True)
class AtBudget:
    """Score, percent, at `eflops` from the joint: the noiseless curve, and one score measured there."""

    eflops: float
    score: float  # median
    low: float | None  # 5 % quantile; None, as the next three: of the method `paper`
    high: float | None  # 95 % quantile
    measured_low: float | None  # with the noise of a measurement
    measured_high: float | None


def reach(fit: Fit | PaperFit, score: float) -> Reach:
    """0 EFLOPs where the curve begins at `score` or above."""
    if isinstance(fit, PaperFit):
        level = fit.p_sft + fit.eps
        found = (
            None
            if fit.b is None or fit.c_mid is None
            else float(_compute(score, level, fit.a_post - level, fit.b, fit.c_mid))
        )
        return Reach(float(score), None, found if found is not None and np.isfinite(found) else None, None, None)
    draws = fit.draws
    eflops = _compute(score, draws.l, draws.d, draws.b, draws.c)
    probability = float(draws.weight @ np.isfinite(eflops))
    low, median, high = (_quantile(fit, eflops, quantile) for quantile in QUANTILES)
    return Reach(float(score), min(probability, 1.0), median, low, high)


def _compute(
    score: float, level: np.ndarray | float, gain: np.ndarray | float, b: np.ndarray | float, c: np.ndarray | float
) -> np.ndarray:
    """x where level + gain s(x) = score; infinite where it never does."""
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        share = (score - np.asarray(level)) / np.asarray(gain)
        odds = np.where(score <= np.asarray(level), 0.0, np.where(share < 1, share / (1 - share), np.inf))
        return c * odds ** (1 / np.asarray(b))


def _quantile(fit: Fit, eflops: np.ndarray, quantile: float) -> float | None:
    """Of the draws, without a value in between two: one of them may be 0, or infinite."""
    order = np.argsort(eflops, kind="stable")
    at = np.searchsorted(np.cumsum(fit.draws.weight[order]), quantile)
    value = float(eflops[order[min(at, len(order) - 1)]])
    return value if np.isfinite(value) else None


def at_budgets(fit: Fit | PaperFit, eflops: Sequence[float]) -> list[AtBudget]:
    """Scores at `eflops`, 0 or more."""
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
    """How a fit of the first points of a curve met the rest of it."""

    points: int  # held out, without those after a collapse of the whole curve
    rmse: float | None  # points, of the predicted median; None: there is no such point
    inside: float | None  # share of them within the predictive 90 % interval; None: as above, and of the method `paper`


def held_out(fit: Fit | PaperFit, eflops: np.ndarray, scores: np.ndarray) -> HeldOut:
    """`eflops`, `scores` [n], n >= 0: the points that the fit did not see."""
    if not len(eflops):
        return HeldOut(0, None, None)
    inside = None
    if isinstance(fit, PaperFit):
        predicted = fit.curve(eflops)
    else:
        predicted, low, high = fit.predict(eflops)
        inside = float(np.mean((low <= scores) & (scores <= high)))
    return HeldOut(len(eflops), float(np.sqrt(np.mean((scores - predicted) ** 2))), inside)
