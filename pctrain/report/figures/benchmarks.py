"""The figure of single benchmarks, one panel each."""

from __future__ import annotations

from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from pctrain.report.charts.chart import Chart
from pctrain.report.figures.panels import add_legend_below, color, make_panels
from pctrain.report.looks import MARKERS


def draw(chart: Chart) -> Figure:
    """Draw the figure."""
    spec = chart.spec
    figure, panels = make_panels(chart, len(spec["names"]), share_y=False)
    for name, axes in zip(spec["names"], panels, strict=True):
        for series in spec["series"]:
            axes.plot(
                series["x"],
                [float("nan") if value is None else value for value in series["y"][name]],
                color=color(series["colour"]),
                lw=1.2 if series["kind"] == "rl" else 1.8,
                alpha=0.8,
                marker=MARKERS[series["marker"]],
                ms=2.5,
            )
        axes.set_title(name)
        axes.set(xlabel=spec["x"], ylabel=spec["y"])
    # A color is a set if there are several, otherwise a group of runs.
    named = {(s["set"] if spec["sets"] else "") or s["group"]: s for s in spec["series"]}
    handles = [
        Line2D([], [], color=color(s["colour"]), marker=MARKERS[s["marker"]], ms=4, label=name)
        for name, s in named.items()
    ]
    add_legend_below(figure, handles, columns=4)
    return figure
