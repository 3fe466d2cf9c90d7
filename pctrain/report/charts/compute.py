"""Where the compute went, by phase and run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pctrain.compute.ledger import PHASES
from pctrain.report.charts.chart import Chart, run_name
from pctrain.report.looks import PHASE_NAMES, flop_scale, run_looks
from pctrain.report.study_data import RLRun, SFTRun, Study

LEDGER_METRICS = (
    ("exact_flops", "exact FLOPs"),
    ("paper_flops", "FLOPs by the paper's formulas"),
    ("tokens", "tokens"),
    ("seconds", "wall seconds"),
    ("device_seconds", "device seconds"),
)
CAPTION = (
    "All runs of this folder, by phase. The formulas of arXiv 2512.11470, appendix E, give the x of every curve and "
    "every fit. The exact count uses causal attention and includes what the formulas omit, such as log-prob passes. "
    "Validation and evaluation (marked *) are never in x."
)


def build(study: Study) -> Chart | None:
    """Build the chart, or return None if no run has a ledger entry."""
    phases = [phase for phase in PHASES if phase in study.ledger()]
    if not phases:
        return None
    looks = run_looks(study)
    runs = [run for run in study.runs if run.ledger]
    metrics = [metric for key, title in LEDGER_METRICS for metric in _metric(key, title, runs, phases)]
    spec = {
        "phases": [PHASE_NAMES[phase] for phase in phases],
        "measuring": [PHASES[phase].axis is None for phase in phases],
        "metrics": metrics,
        "runs": [{"name": run_name(run), "colour": looks[run.name].alone} for run in runs],
    }
    keys = ("sequences", *(metric["key"] for metric in metrics))
    rows = [row for run in runs for row in _rows(run, phases, keys)]
    return Chart("compute", "Where the compute went", CAPTION, spec, ("run", "phase", *keys), rows)


def _rows(run: SFTRun | RLRun, phases: Sequence[str], keys: Sequence[str]) -> list[list[Any]]:
    return [[run.name, phase, *(run.ledger[phase][key] for key in keys)] for phase in phases if phase in run.ledger]


def _metric(key: str, title: str, runs: Sequence[SFTRun | RLRun], phases: Sequence[str]) -> list[dict[str, Any]]:
    """Return the values of a metric, [runs][phases], in a readable unit; nothing if every value is 0."""
    values = [[run.ledger.get(phase, {}).get(key, 0.0) for phase in phases] for run in runs]
    if not any(map(any, values)):
        return []
    largest = max(sum(column) for column in zip(*values, strict=True))
    factor, unit = 1e18, key.replace("_", " ").replace("seconds", "s")
    if key.endswith("flops"):
        factor, unit = flop_scale(largest / 1e18)
    return [{"key": key, "title": title, "unit": unit, "values": [[v / 1e18 * factor for v in row] for row in values]}]
