"""The charts of the report: for each the spec that the page draws (JSON) and the rows of its CSV, built from a `Study`.

Each chart has a module of its name here, which builds it, and one in `figures`, which draws its PNG. A spec gives
colors by their name in looks.PALETTE and compute in a readable unit; a CSV has EFLOPs and percent throughout.
templates/report.charts.js.j2 draws every chart in the page and computes nothing but positions.
"""

from __future__ import annotations

from collections.abc import Mapping

from pctrain.report.charts import (
    benchmarks,
    ceiling_vs_loss,
    ceilings,
    compute,
    score_vs_compute,
    validation_loss,
)
from pctrain.report.charts.chart import Chart
from pctrain.report.held_out import ForecastTest
from pctrain.report.study_data import Study


def build(study: Study, held: Mapping[str, ForecastTest | None]) -> list[Chart]:
    """Build the charts that the study has data for, in the order of the page. `held` is by run name."""
    charts = [
        validation_loss.build(study),
        score_vs_compute.build(study, held),
        ceilings.build(study),
        ceiling_vs_loss.build(study),
        benchmarks.build(study),
        compute.build(study),
    ]
    return [chart for chart in charts if chart is not None]
