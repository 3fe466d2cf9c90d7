"""The figure of the compute by phase and run: the exact count, and the one by the paper's formulas."""

from __future__ import annotations

from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from pctrain.report.charts.chart import Chart
from pctrain.report.figures.panels import add_legend_below, color, make_panels, use_vertical_grid

DRAWN_METRICS = ("exact_flops", "paper_flops")
MAX_NAMED_RUNS = 12


def draw(chart: Chart) -> Figure:
    """Draw the figure."""
    spec = chart.spec
    metrics = [metric for metric in spec["metrics"] if metric["key"] in DRAWN_METRICS] or spec["metrics"][:1]
    figure, panels = make_panels(chart, len(metrics), height=1.9 + 0.42 * len(spec["phases"]))
    for metric, axes in zip(metrics, panels, strict=True):
        _draw_metric(axes, metric, spec)
    phases = [
        name + (" *" if measuring else "") for name, measuring in zip(spec["phases"], spec["measuring"], strict=True)
    ]
    panels[0].set_yticks(range(len(phases)), phases)  # the panels share their rows
    panels[0].set_ylim(len(phases) - 0.5, -0.5)
    runs = {run["name"]: run for run in spec["runs"][:MAX_NAMED_RUNS]}
    add_legend_below(figure, [Patch(color=color(run["colour"]), label=name) for name, run in runs.items()], columns=4)
    return figure


def _draw_metric(axes: Axes, metric: dict[str, Any], spec: dict[str, Any]) -> None:
    """Draw a stacked bar per phase, one segment per run, with the sum at its end."""
    axes.set_title(metric["title"])
    axes.set_xlabel(metric["unit"])
    use_vertical_grid(axes)
    totals = [0.0] * len(spec["phases"])
    for run, values in zip(spec["runs"], metric["values"], strict=True):
        for row, value in enumerate(values):
            axes.barh(
                row,
                value,
                left=totals[row],
                height=0.62,
                color=color(run["colour"]),
                alpha=0.45 if spec["measuring"][row] else 1,
                edgecolor="white",
                lw=0.4,
            )
            totals[row] += value
    for row, value in enumerate(totals):
        axes.text(value, row, f" {value:.3g}", va="center", fontsize=8)
    axes.set_xlim(0, 1.16 * max(totals) or 1)
    axes.tick_params(axis="y", length=0)
