"""How well a fit forecasts: fit the first 71% of a run's points and compare the forecast with the remaining points."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from pctrain.ceiling.curve import first_points
from pctrain.ceiling.fit import MIN_POINTS, fit_ceiling
from pctrain.report.fit_options import PAPER_SHARE
from pctrain.report.study_data import CURVE_POINTS, FittedRun, RLRun


@dataclass(frozen=True)
class ForecastTest:
    """The forecast of a fit that saw only the first points of a run, and how the other points compare with it.

    `curve` is {eflops_rl, median, low, high} over the whole run. Its interval is that of a measured score, noise
    included. `rmse` and `outside` leave out the points after a collapse.
    """

    seen: int  # index in `run.points` of the first held-out point
    curve: dict[str, list[float]]
    predicted: list[float]  # at the held-out points, percent
    rmse: float | None  # points; None: there is no held-out point before a collapse
    outside: int  # held-out points above or below the interval


def predict(run: RLRun) -> ForecastTest | None:
    """Return the forecast, or None if the run has no fit or the first 71% of its points are too few for a ceiling."""
    if not isinstance(run, FittedRun):
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
    median, _, _ = fit.curve(grid)
    _, low, high = fit.predict(grid)
    predicted, below, above = fit.predict(x[kept:])
    end = len(x) if run.fit.collapsed_at is None else int(np.searchsorted(x, run.fit.collapsed_at))
    before = slice(0, max(0, end - kept))
    measured = y[kept:][before]
    miss = measured - predicted[before]
    outside = (measured < below[before]) | (measured > above[before])
    return ForecastTest(
        seen=len(run.points) - len(x) + kept,
        curve={"eflops_rl": grid.tolist(), "median": median.tolist(), "low": low.tolist(), "high": high.tolist()},
        predicted=predicted.tolist(),
        rmse=float(np.sqrt(np.mean(miss**2))) if len(miss) else None,
        outside=int(outside.sum()),
    )
