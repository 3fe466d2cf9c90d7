"""How well a fit foretells: the curve of the first 71 % of a run's points, held against the rest, which that fit has not seen."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from pctrain.ceiling.curve import first_points
from pctrain.ceiling.fit import MIN_POINTS, fit_ceiling
from pctrain.report.fit_options import PAPER_SHARE
from pctrain.report.study_data import CURVE_POINTS, RLRun


@dataclass(frozen=True)
class HeldOut:
    """`seen`: index in `run.points` of the first held-out one. `curve`: {eflops_rl, median, low, high} over the whole run, the
    interval that of a score measured there, its noise included."""

    seen: int
    curve: dict[str, list[float]]
    predicted: list[float]  # of the held-out points, percent
    rmse: float | None  # over the held-out points before a collapse, points; None: there is none
    outside: int  # of these, how many lie above or below that interval


def predict(run: RLRun) -> HeldOut | None:
    """None where the first 71 % are too few points for a ceiling, or the run was not fitted at all."""
    if run.fit is None:
        return None
    given = run.fit.points
    x, y = given.x, given.y
    kept = first_points(len(x), PAPER_SHARE)
    if kept < MIN_POINTS or kept == len(x):
        return None
    fit = fit_ceiling(
        x[:kept], y[:kept], given.p_sft, score_se=given.score_se, p_sft_se=given.p_sft_se, max_score=given.max_score
    )
    grid = np.linspace(0.0, x[-1], CURVE_POINTS)
    median, (_, low, high) = fit.curve(grid)[0], fit.predict(grid)
    predicted, below, above = fit.predict(x[kept:])
    end = len(x) if run.fit.collapsed_at is None else int(np.searchsorted(x, run.fit.collapsed_at))
    before = slice(0, max(0, end - kept))
    miss = y[kept:][before] - predicted[before]
    outside = (y[kept:][before] < below[before]) | (y[kept:][before] > above[before])
    return HeldOut(
        len(run.points) - len(x) + kept,
        {"eflops_rl": grid.tolist(), "median": median.tolist(), "low": low.tolist(), "high": high.tolist()},
        predicted.tolist(),
        float(np.sqrt(np.mean(miss**2))) if len(miss) else None,
        int(outside.sum()),
    )
