"""A chart, and what all charts share: names of runs, colors and markers of series, units of compute."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from pctrain.report.looks import Look, flop_scale
from pctrain.report.study_data import RLPoint, RLRun, SFTRun, SFTScore, Study

FORMULA_STARTS = ("=", "+", "-", "@", "\t", "\r")


@dataclass(frozen=True)
class Chart:
    """A chart. `name` is the name of its drawing function, its place in the page and its files (NAME.csv, NAME.png)."""

    name: str
    title: str
    caption: str
    spec: dict[str, Any]
    columns: tuple[str, ...]
    rows: list[list[Any]]

    def csv(self) -> str:
        """Return the rows as CSV."""
        out = io.StringIO()
        writer = csv.writer(out, lineterminator="\n")
        writer.writerows([[_plain_cell(value) for value in row] for row in (self.columns, *self.rows)])
        return out.getvalue()


def _plain_cell(value: Any) -> Any:
    """Return the value quoted if a spreadsheet would run it as a formula: names come from files."""
    if isinstance(value, str) and value.startswith(FORMULA_STARTS):
        return "'" + value
    return "" if value is None else value


# ---- names


def run_name(run: SFTRun | RLRun) -> str:
    """Return the name of a run in charts and legends."""
    if isinstance(run, RLRun):
        return f"RL from {run.label}"
    return f"SFT on {run.label}" if run.label else "pure SFT"


def group_name(run: SFTRun | RLRun) -> str:
    """Return the run's name without its seed: the runs of one experiment, which a reader looks at together."""
    return run_name(replace(run, varies=run.varies - {"seed"}))


def set_names(study: Study) -> list[str]:
    """Return the names of the trajectory sets that a reader can choose from; none if there is only one set."""
    names = list(dict.fromkeys(run.set for run in study.runs if run.set))
    return names if len(names) > 1 else []


# ---- series


def identity(run: SFTRun | RLRun, looks: Mapping[str, Look], runs_in_chart: Sequence[SFTRun | RLRun]) -> dict[str, Any]:
    """Return the fields of a series that say which run it is and how it looks.

    `seeded` marks one of several runs that differ only in their seed, `first` the first of those.
    """
    group = group_name(run)
    same_group = [other for other in runs_in_chart if group_name(other) == group]
    look = looks[run.name]
    return {
        "name": run_name(run),
        "group": group,
        "set": run.set,
        "colour": look.colour,
        "alone": look.alone,
        "marker": look.marker,
        "seeded": len(same_group) > 1,
        "first": run is same_group[0],
    }


def point_steps(run: SFTRun | RLRun, points: Sequence[SFTScore | RLPoint]) -> list[int | None]:
    """Return the step of each point; None for RL runs from a file of curves, which states compute and no steps."""
    if isinstance(run, RLRun) and not run.config_text:
        return [None] * len(points)
    return [p.step for p in points]


# ---- compute


def readable_scale(compute: Iterable[tuple[str, float]]) -> tuple[float, str]:
    """Return (factor, unit) for the largest EFLOPs of the set that spent least, given (set, EFLOPs) pairs.

    A reader looks at one set at a time, and 0.002 of a unit is hard to read.
    """
    largest: dict[str, float] = {}
    for set_name, eflops in compute:
        largest[set_name] = max(largest.get(set_name, 0.0), eflops)
    return flop_scale(min(largest.values()))


def total_eflops(run: SFTRun | RLRun, point: SFTScore | RLPoint) -> float:
    """Return the training compute up to a score, SFT and RL."""
    if isinstance(point, SFTScore):
        return point.eflops_sft
    return (run.eflops_sft if isinstance(run, RLRun) else 0.0) + point.eflops_rl
