"""The highest RL ceiling from each SFT run against that run's minimum validation loss."""

from __future__ import annotations

from typing import Any, Literal

from pctrain.ceiling.correlation import correlate
from pctrain.report.charts.chart import Chart
from pctrain.report.looks import run_looks, shows_ceiling
from pctrain.report.study_data import Study

COLUMNS = ("set", "min_val_loss", "a_post", "a_post_low", "a_post_high", "verdict", "start_step")
CAPTION = (
    "One point per trajectory set: the minimum of its validation loss and the highest ceiling of RL from its "
    "checkpoints, with its 90% interval. Filled points are identified."
)
MIN_POINTS = 2
MIN_CORRELATED = 3
KINDS: tuple[Literal["pearson", "spearman"], ...] = ("pearson", "spearman")


def build(study: Study) -> Chart | None:
    """Build the chart, or return None if fewer than two SFT runs have both a validation loss and RL with a ceiling."""
    points = _points(study)
    if len(points) < MIN_POINTS:
        return None
    caption = CAPTION
    if len(points) >= MIN_CORRELATED:
        pearson, spearman = (correlate([p["x"] for p in points], [p["y"] for p in points], kind) for kind in KINDS)
        caption += (
            f" Pearson {pearson}, Spearman {spearman} over {len(points)} points. arXiv 2512.11470 reports -0.92 and "
            "-1.00 over five sets."
        )
    spec = {"x": "minimum validation loss (nats per token)", "y": "highest ceiling A_post (%)", "points": points}
    rows = [[p[key] for key in ("name", "x", "y", "low", "high", "verdict", "start")] for p in points]
    return Chart("ceiling_vs_loss", "Ceiling against minimum validation loss", caption, spec, COLUMNS, rows)


def _points(study: Study) -> list[dict[str, Any]]:
    looks = run_looks(study)
    fitted = [run for run in study.fitted if run.start_step > 0 and shows_ceiling(run)]
    points = []
    for sft in study.sft:
        runs = [run for run in fitted if study.sft_of(run) is sft]
        if sft.best is None or not runs:
            continue
        highest = max(runs, key=lambda run: run.fit.a_post)
        points.append(
            {
                "name": sft.label or sft.name,
                "colour": looks[sft.name].colour,
                "x": sft.best.val_loss,
                "y": highest.fit.a_post,
                "low": highest.fit.a_post_low,
                "high": highest.fit.a_post_high,
                "verdict": highest.fit.verdict,
                "start": highest.start_step,
            }
        )
    return points
