"""The figure of the highest RL ceiling against the minimum validation loss, one point per set."""

from __future__ import annotations

from matplotlib.figure import Figure

from pctrain.report.charts.chart import Chart
from pctrain.report.figures.panels import color, make_panels


def draw(chart: Chart) -> Figure:
    """Draw the figure."""
    figure, (axes,) = make_panels(chart, 1)
    axes.set(xlabel=chart.spec["x"], ylabel=chart.spec["y"])
    for point in chart.spec["points"]:
        own = color(point["colour"])
        axes.errorbar(
            point["x"],
            point["y"],
            yerr=[[point["y"] - point["low"]], [point["high"] - point["y"]]],
            color=own,
            marker="o",
            ms=8,
            capsize=4,
            mfc=own if point["verdict"] == "identified" else "white",
            mew=1.6,
        )
        axes.annotate(
            point["name"],
            (point["x"], point["y"]),
            xytext=(8, 6),
            textcoords="offset points",
            color=own,
            fontweight="bold",
            fontsize=9,
        )
    axes.margins(x=0.2, y=0.15)
    return figure
