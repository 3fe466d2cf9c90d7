"""How well a fit foretells: the curve of the first 71 % of a run's points, held against the rest, which that fit has not seen."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from pctrain.ceiling.fit import MIN_POINTS, fit_ceiling
from pctrain.ceiling.study_data import CURVE_POINTS, RLRun, typical_se

SHARE = 0.71  # of the points, by index: the mean split of arXiv 2512.11470, appendix F


@dataclass(frozen=True)
class HeldOut:
    """`seen`: index in `run.points` of the first held-out one. `curve`: {eflops_rl, median, low, high} over the whole run."""

    seen: int
    curve: dict[str, list[float]]
    predicted: list[float]  # of the held-out points, percent
    rmse: float | None  # over the held-out points before a collapse, points; None: there is none
    outside: int  # of these, how many lie above or below the 90 % interval of the curve


def predict(run: RLRun, score_se_known: bool = True) -> HeldOut | None:
    """None where the first 71 % are too few points for a ceiling, or the run was not fitted at all."""
    after = [p for p in run.points if p.eflops_rl > 0]
    kept = round(SHARE * len(after))
    if run.fit is None or kept < MIN_POINTS or kept == len(after):
        return None
    x, y = np.array([p.eflops_rl for p in after]), np.array([p.score for p in after])
    errors = {"score_se": typical_se(run.points), "p_sft_se": run.p_sft.se or None} if score_se_known else {}
    fit = fit_ceiling(x[:kept], y[:kept], run.p_sft.value, **errors)
    grid = np.linspace(0.0, x[-1], CURVE_POINTS)
    median, low, high = fit.curve(grid)
    predicted, below, above = fit.curve(x[kept:])
    end = len(x) if run.fit.collapsed_at is None else int(np.searchsorted(x, run.fit.collapsed_at))
    before = slice(0, max(0, end - kept))
    miss = y[kept:][before] - predicted[before]
    outside = (y[kept:][before] < below[before]) | (y[kept:][before] > above[before])
    return HeldOut(len(run.points) - len(after) + kept,
                   {"eflops_rl": grid.tolist(), "median": median.tolist(), "low": low.tolist(), "high": high.tolist()}, predicted.tolist(),
                   float(np.sqrt(np.mean(miss**2))) if len(miss) else None, int(outside.sum()))
