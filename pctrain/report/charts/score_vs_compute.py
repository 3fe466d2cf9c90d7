"""Score against total training compute: pure SFT, and RL runs with their fits and held-out forecasts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from pctrain.report.charts.chart import Chart, group_name, identity, point_steps, readable_scale, set_names
from pctrain.report.held_out import ForecastTest
from pctrain.report.looks import Look, ceiling_text, run_looks
from pctrain.report.study_data import FittedRun, RLRun, ScoredRun, SFTRun, Study

CAPTION = (
    "Points are measured scores; hover to see their standard errors. The line of an RL run is the fitted sigmoid with "
    "the 90% interval of the curve. It is solid if the ceiling is identified and dashed if not. Open diamonds: pure "
    "SFT at the total compute of the run. “Held out” fits only the first 71% of a run's points and compares the "
    "forecast with the others, drawn hollow; its band is the 90% interval of a measured score. Evaluation compute is "
    "not in x."
)
COLUMNS = (
    "kind",
    "set",
    "seed",
    "start_step",
    "algorithm",
    "step",
    "eflops_sft",
    "eflops_rl",
    "score",
    "score_se",
    "fit",
    "fit_low",
    "fit_high",
    "held_out",
    "predicted",
)


def build(study: Study, held: Mapping[str, ForecastTest | None]) -> Chart | None:
    """Build the chart, or return None if no run has a score. `held` is by run name."""
    sft = [run for run in study.sft if run.scores]
    rl = study.scored
    if not sft and not rl:
        return None
    looks = run_looks(study)
    sft_compute = [(run.set, run.scores[-1].eflops_sft) for run in sft]
    factor, unit = readable_scale(sft_compute + [(run.set, run.eflops_total) for run in rl])
    series = [_sft_series(run, factor) | identity(run, looks, sft) for run in sft]
    series += [_rl_series(run, factor, held[run.name]) | identity(run, looks, rl) for run in rl]
    rows = [row for run in sft for row in _sft_rows(run)]
    rows += [row for run in rl for row in _rl_rows(run, held[run.name])]
    spec = {
        "x": f"training compute, SFT + RL ({unit})",
        "x_rl": f"RL compute from the switch point ({unit})",
        "y": "score (% of test problems)",
        "unit": unit,
        "series": series,
        "sets": set_names(study),
        "means": [mean for runs in (sft, rl) for mean in _means(runs, looks, factor)],
    }
    return Chart("score_vs_compute", "Score against training compute", CAPTION, spec, COLUMNS, rows)


# ---- series


def _sft_series(run: SFTRun, factor: float) -> dict[str, Any]:
    return {
        "kind": "sft",
        "switch_point": 0.0,
        "x": [p.eflops_sft * factor for p in run.scores],
        "y": [p.score for p in run.scores],
        "se": [p.score_se for p in run.scores],
        "steps": point_steps(run, run.scores),
    }


def _rl_series(run: ScoredRun, factor: float, held: ForecastTest | None) -> dict[str, Any]:
    equal = run.sft_equal
    return {
        "kind": "rl",
        "switch_point": run.eflops_sft * factor,
        "x": [p.eflops_rl * factor for p in run.points],
        "y": [p.score for p in run.points],
        "se": [p.score_se for p in run.points],
        "steps": point_steps(run, run.points),
        "fit": _fit(run, factor),
        "verdict": ceiling_text(run).replace("\n", ", "),
        "held": _forecast(held, factor),
        "equal": None if equal.value is None else {"y": equal.value, "se": equal.se},
    }


def _fit(run: ScoredRun, factor: float) -> dict[str, Any] | None:
    curve = run.curve()
    if curve is None or not isinstance(run, FittedRun):
        return None
    return _scaled(curve, factor) | {"identified": run.fit.verdict == "identified"}


def _forecast(held: ForecastTest | None, factor: float) -> dict[str, Any] | None:
    if held is None:
        return None
    return _scaled(held.curve, factor) | {"seen": held.seen, "rmse": held.rmse, "outside": held.outside}


def _scaled(curve: Mapping[str, list[float]], factor: float) -> dict[str, Any]:
    return {"x": [x * factor for x in curve["eflops_rl"]]} | {key: curve[key] for key in ("median", "low", "high")}


# ---- means over seeds


def _means(
    runs: Sequence[SFTRun] | Sequence[ScoredRun], looks: Mapping[str, Look], factor: float
) -> list[dict[str, Any]]:
    """Return the means over seeds, plus and minus their standard errors, at the steps that all seeds were scored at."""
    groups: dict[str, list[SFTRun | RLRun]] = {}
    for run in runs:
        groups.setdefault(group_name(run), []).append(run)
    means = []
    for group, members in groups.items():
        scores = [_scores_by_step(run) for run in members]
        steps = sorted(set.intersection(*map(set, scores)))
        if len(members) > 1 and steps:
            values = np.array([[seed[step] for step in steps] for seed in scores])  # [seeds, steps, (EFLOPs, score)]
            means.append(_mean(group, members, values, looks[members[0].name], factor))
    return means


def _scores_by_step(run: SFTRun | RLRun) -> dict[int, tuple[float, float]]:
    """Return {step: (EFLOPs, score)}; the EFLOPs of an RL run count from its switch point."""
    if isinstance(run, RLRun):
        return {p.step: (p.eflops_rl, p.score) for p in run.points}
    return {p.step: (p.eflops_sft, p.score) for p in run.scores}


def _mean(
    group: str, members: Sequence[SFTRun | RLRun], values: np.ndarray, look: Look, factor: float
) -> dict[str, Any]:
    x, y = values.mean(axis=0).T
    se = values[:, :, 1].std(axis=0, ddof=1) / np.sqrt(len(members))
    switch_points = [run.eflops_sft if isinstance(run, RLRun) else 0.0 for run in members]
    return {
        "group": group,
        "set": members[0].set,
        "colour": look.colour,
        "alone": look.alone,
        "seeds": len(members),
        "switch_point": float(np.mean(switch_points)) * factor,
        "x": (x * factor).tolist(),
        "y": y.tolist(),
        "low": (y - se).tolist(),
        "high": (y + se).tolist(),
    }


# ---- CSV


def _sft_rows(run: SFTRun) -> list[list[Any]]:
    return [
        ["sft", run.set, run.seed, "", "", p.step, p.eflops_sft, 0.0, p.score, p.score_se, "", "", "", "", ""]
        for p in run.scores
    ]


def _rl_rows(run: ScoredRun, held: ForecastTest | None) -> list[list[Any]]:
    rows: list[list[Any]] = []
    for i, (p, fitted) in enumerate(zip(run.points, _fitted_scores(run), strict=True)):
        held_out: int | str = ""
        predicted: float | str = ""
        if held is not None:
            held_out = int(i >= held.seen)
            predicted = held.predicted[i - held.seen] if held_out else ""
        start = [run.set, run.seed, run.start_step, run.algorithm]
        measured = [p.step, run.eflops_sft, p.eflops_rl, p.score, p.score_se]
        rows.append(["rl", *start, *measured, *fitted, held_out, predicted])
    return rows


def _fitted_scores(run: ScoredRun) -> list[tuple[Any, ...]]:
    """Return (median, low, high) of the fit at every point; empty cells without a fit."""
    if not isinstance(run, FittedRun):
        return [("", "", "")] * len(run.points)
    return list(zip(*run.fit.curve([p.eflops_rl for p in run.points]), strict=True))
