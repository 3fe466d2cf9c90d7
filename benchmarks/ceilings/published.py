"""Checks on the published curves: agreement with the published ceilings, and checks that need no published value."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from benchmarks.ceilings.checks import Check, share, width
from pctrain.ceiling import collapse
from pctrain.ceiling.curve import Curve
from pctrain.ceiling.fit import Fit, fit_ceiling
from pctrain.ceiling.paper_fit import least_squares_fit, paper_fit
from pctrain.ceiling.posterior import rise
from pctrain.report.curves import read_curves
from pctrain.report.fit_options import PAPER_SHARE

FILE = Path(__file__).parents[2] / "tests" / "helpers" / "published_curves.json"
# The table of fitted ceilings in arXiv 2512.11470v2 (Qwen2.5-7B).
PUBLISHED = {
    ("S1K", 62): 77.0,
    ("S1K", 124): 76.9,
    ("S1K", 186): 76.5,
    ("S1K", 248): 76.4,
    ("S1K", 310): 75.9,
    ("Easy102K", 360): 76.7,
    ("Easy102K", 720): 78.5,
    ("Easy102K", 1080): 78.8,
    ("Easy102K", 1440): 76.8,
    ("Easy102K", 1800): 77.8,
    ("SFT889K", 360): 82.5,
    ("SFT889K", 720): 80.7,
    ("SFT889K", 1440): 80.3,
    ("SFT889K", 3600): 83.1,
    ("SFT889K", 7200): 84.0,
    ("SFT889K", 14080): 84.0,
}
NORMAL_90 = 1.645


@dataclass(frozen=True)
class Case:
    """One curve, its fits, and its held-out points: the last 29%, without those after a collapse of the whole curve."""

    curve: Curve
    published: float
    early: Fit  # of the first 71%
    full: Fit
    n: int
    collapse: int | None

    @property
    def seen(self) -> tuple[np.ndarray, np.ndarray]:
        """The EFLOPs and scores that the early fit saw."""
        return self.curve.eflops[: self.n], self.curve.scores[: self.n]

    @property
    def rest(self) -> tuple[np.ndarray, np.ndarray]:
        """The EFLOPs and scores held out of the early fit."""
        return self.curve.eflops[self.n : self.collapse], self.curve.scores[self.n : self.collapse]


def case_of(curve: Curve) -> Case:
    """Fit a curve that has a published ceiling."""
    n = curve.first(PAPER_SHARE)
    if curve.start_step is None:
        raise ValueError(f"{curve.name}: a published curve has a start step")
    early = fit_ceiling(curve.eflops[:n], curve.scores[:n], curve.p_sft)
    full = fit_ceiling(curve.eflops, curve.scores, curve.p_sft)
    onset = collapse.used_points(curve.scores, curve.p_sft, None)[1]
    return Case(curve, PUBLISHED[curve.dataset, curve.start_step], early, full, n, onset)


def read(file: Path) -> list[Curve]:
    """Read the curves that have a published ceiling."""
    return [curve for curve in read_curves(file) if (curve.dataset, curve.start_step) in PUBLISHED]


def agreement(all_cases: Sequence[Case]) -> list[Check]:
    """Compare the ceilings with the published ones."""
    checks = []
    for name, limits in (("early", (0.7, 1.0, 0.40)), ("full", (1.0, None, 0.50))):
        fits = [getattr(case, name) for case in all_cases]
        error = np.array([abs(fit.a_post - case.published) for fit, case in zip(fits, all_cases, strict=True)])
        inside = np.array(
            [fit.a_post_low <= case.published <= fit.a_post_high for fit, case in zip(fits, all_cases, strict=True)]
        )
        known = np.array([fit.verdict == "identified" for fit in fits])
        widths = np.array([fit.a_post_high - fit.a_post_low for fit in fits])
        points = "first 71%" if name == "early" else "all points"
        checks += [
            Check(f"{points}: median distance to published", float(np.median(error)), high=limits[0]),
            Check(
                f"{points}: mean distance to published",
                float(error.mean()),
                high=limits[1],
                note=f"largest {error.max():.1f}",
            ),
            Check(f"{points}: identified", share(known), low=limits[2], note=f"{known.sum()} of {len(known)}"),
            Check(f"{points}: worst identified", float(error[known].max(initial=0.0)), high=2.0),
            Check(f"{points}: identified, published inside", share(inside[known]), low=0.85, note=width(widths[known])),
            Check(f"{points}: all, published inside", share(inside), note=width(widths)),
        ]
    return checks


def without_published(all_cases: Sequence[Case]) -> list[Check]:
    """Check held-out points, consistency and alarms, which need no published value."""
    errors, inside, widths = _predictions(all_cases)
    ours = errors["pctrain"]
    rmse = "held-out RMSE, mean over curves"
    checks = [Check(f"{rmse}: pctrain", float(ours.mean()), form=".3f", note=f"median {np.median(ours):.2f}")]
    for name in errors:
        if name != "pctrain":
            wins = int((ours < errors[name]).sum())
            note = f"median {np.median(errors[name]):.2f}; pctrain is better on {wins} of {len(ours)} curves"
            above = float(np.nextafter(ours.mean(), np.inf))
            checks.append(Check(f"{rmse}: {name}", float(errors[name].mean()), low=above, form=".3f", note=note))
    checks += [
        Check(
            f"held-out points in the predictive 90% interval: {name}",
            share(inside[name]),
            low=0.80 if name == "pctrain" else None,
            form=".3f",
            note=width(widths[name]),
        )
        for name in inside
    ]
    within = [case.early.a_post_low <= case.full.a_post <= case.early.a_post_high for case in all_cases]
    alarms = [early_alarms(case) for case in all_cases]
    checks += [
        Check(
            "A from all points inside the 71% interval",
            share(within),
            low=0.85,
            note=width([case.early.a_post_high - case.early.a_post_low for case in all_cases]),
        ),
        Check(
            "collapse alarms before a collapse, points one by one",
            float(sum(alarms)),
            high=0,
            form=".0f",
            note=f"{sum(case.collapse is not None for case in all_cases)} of {len(all_cases)} curves collapse",
        ),
    ]
    return checks


def early_alarms(case: Case) -> int:
    """Count the prefixes of the curve before its collapse (or its end) that are called collapsed."""
    scores = case.curve.scores[: case.collapse]
    return sum(
        collapse.used_points(scores[:n], case.curve.p_sft, None)[1] is not None for n in range(1, len(scores) + 1)
    )


def _predictions(
    all_cases: Sequence[Case],
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Return by method: the RMSE of each curve, the held-out points inside the 90% interval, and its widths there."""
    errors: dict[str, list[float]] = {}
    inside: dict[str, list[np.ndarray]] = {}
    widths: dict[str, list[np.ndarray]] = {}
    for case in all_cases:
        x, y = case.rest
        for name, (predicted, low, high) in _methods(case, x):
            errors.setdefault(name, []).append(float(np.sqrt(np.mean((predicted - y) ** 2))))
            if low is not None and high is not None:
                inside.setdefault(name, []).append((low <= y) & (y <= high))
                widths.setdefault(name, []).append(high - low)
    return (
        {name: np.array(values) for name, values in errors.items()},
        {name: np.concatenate(values) for name, values in inside.items()},
        {name: np.concatenate(values) for name, values in widths.items()},
    )


# The prediction and its bounds, each [n]; None if a method has no bounds.
Prediction = tuple[np.ndarray, np.ndarray | None, np.ndarray | None]


def _methods(case: Case, at: np.ndarray) -> Iterable[tuple[str, Prediction]]:
    """Yield (name, prediction at `at` EFLOPs) of pctrain and its rivals, each fitted to the seen points."""
    x, y = case.seen
    yield "pctrain", case.early.predict(at)
    a, b, c = least_squares_fit(x, y, case.curve.p_sft)

    def sigmoid(x: np.ndarray) -> np.ndarray:
        return case.curve.p_sft + (a - case.curve.p_sft) * rise(x, b, c)

    yield "plain least squares", _with_residuals(sigmoid(at), y - sigmoid(x), 3)
    fit = paper_fit(x, y, case.curve.p_sft)
    yield "method paper", _with_residuals(fit.curve(at), y - fit.curve(x), 3)
    yield "mean of the last fifth seen", (np.full(len(at), y[-max(1, len(y) // 5) :].mean()), None, None)
    slope, level = np.polyfit(np.log(x), y, 1)
    yield "log-linear extrapolation", (level + slope * np.log(at), None, None)


def _with_residuals(predicted: np.ndarray, residual: np.ndarray, parameters: int) -> Prediction:
    """Return the interval that follows if the residuals of the seen points are all the uncertainty."""
    half = NORMAL_90 * float(np.sqrt((residual**2).sum() / (len(residual) - parameters)))
    return predicted, predicted - half, predicted + half
