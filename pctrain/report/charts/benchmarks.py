"""Learning curves of single benchmarks, if the runs recorded them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pctrain.report.charts.chart import Chart, identity, point_steps, readable_scale, set_names, total_eflops
from pctrain.report.looks import Look, run_looks
from pctrain.report.study_data import RLRun, SFTRun, Study

CAPTION = "Each benchmark separately, as measured; nothing is fitted here."


def build(study: Study) -> Chart | None:
    """Build the chart, or return None for fewer than two benchmarks: a single one is the score itself."""
    names = list(dict.fromkeys(name for run in study.runs for p in run.points for name in p.benchmarks))
    if len(names) < 2:
        return None
    runs = [run for run in study.runs if any(p.benchmarks for p in run.points)]
    looks = run_looks(study)
    factor, unit = readable_scale((run.set, total_eflops(run, p)) for run in runs for p in run.points if p.benchmarks)
    spec = {
        "x": f"training compute, SFT + RL ({unit})",
        "y": "score (%)",
        "unit": unit,
        "names": names,
        "series": [_series(run, names, factor, looks, study.runs) for run in runs],
        "sets": set_names(study),
    }
    columns = ("kind", "set", "seed", "start_step", "step", "eflops_total", *names)
    rows = [row for run in runs for row in _rows(run, names)]
    return Chart("benchmarks", "Learning curves by benchmark", CAPTION, spec, columns, rows)


def _kind(run: SFTRun | RLRun) -> str:
    return "rl" if isinstance(run, RLRun) else "sft"


def _series(
    run: SFTRun | RLRun,
    names: Sequence[str],
    factor: float,
    looks: Mapping[str, Look],
    runs: Sequence[SFTRun | RLRun],
) -> dict[str, Any]:
    points = [p for p in run.points if p.benchmarks]
    return identity(run, looks, runs) | {
        "kind": _kind(run),
        "x": [total_eflops(run, p) * factor for p in points],
        "steps": point_steps(run, points),
        "y": {name: [p.benchmarks.get(name) for p in points] for name in names},
    }


def _rows(run: SFTRun | RLRun, names: Sequence[str]) -> list[list[Any]]:
    start_step = run.start_step if isinstance(run, RLRun) else ""
    rows = []
    for p in run.points:
        if p.benchmarks:
            scores = [p.benchmarks.get(name, "") for name in names]
            rows.append([_kind(run), run.set, run.seed, start_step, p.step, total_eflops(run, p), *scores])
    return rows
