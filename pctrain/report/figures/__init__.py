"""The charts of the report as PNG, drawn with matplotlib from their specs.

No pyplot and no display: the same numbers give the same bytes. Each chart of `charts` has a module of its name here.
Several sets, or several benchmarks, are panels next to each other with one scale.
"""

from __future__ import annotations

from collections.abc import Sequence

import matplotlib

from pctrain.report.charts.chart import Chart
from pctrain.report.figures import (
    benchmarks,
    ceiling_vs_loss,
    ceilings,
    compute,
    score_vs_compute,
    validation_loss,
)
from pctrain.report.figures.panels import png
from pctrain.report.looks import STYLE

DRAW = {
    "validation_loss": validation_loss.draw,
    "score_vs_compute": score_vs_compute.draw,
    "ceilings": ceilings.draw,
    "ceiling_vs_loss": ceiling_vs_loss.draw,
    "benchmarks": benchmarks.draw,
    "compute": compute.draw,
}


def draw_all(charts: Sequence[Chart]) -> dict[str, bytes]:
    """Return `{file name: PNG}`."""
    with matplotlib.rc_context(STYLE):
        return {f"{chart.name}.png": png(DRAW[chart.name](chart)) for chart in charts}
