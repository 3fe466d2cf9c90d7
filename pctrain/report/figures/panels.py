"""Shared parts of the figures: panels, legends, colors, PNG."""

from __future__ import annotations

import io
from collections.abc import Sequence

from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine

from pctrain.report.charts.chart import Chart
from pctrain.report.looks import GRID, PALETTE

DASHED = (0, (4, 2))
BAR_HEIGHT = 0.56
MAX_COLUMNS = 3


def make_panels(chart: Chart, count: int, height: float = 4.6, share_y: bool = True) -> tuple[Figure, list[Axes]]:
    """Return a figure with `count` panels, up to three in a row. The panels share one y scale if `share_y`."""
    columns = min(count, MAX_COLUMNS)
    rows = -(-count // columns)
    width = 8.4 if count == 1 else 4.4 * columns
    figure = Figure(
        figsize=(width, height if rows == 1 else 3.2 * rows + 0.8),
        layout=ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.07),
    )
    axes = figure.subplots(rows, columns, sharey=share_y and count > 1, squeeze=False).ravel()
    for panel in axes:
        panel.grid(axis="y", color=GRID, lw=0.8)
        panel.tick_params(length=3)
    for panel in axes[count:]:
        panel.remove()
    figure.suptitle(chart.title, x=0.01, ha="left", fontsize=12, fontweight="bold")
    return figure, list(axes[:count])


def use_vertical_grid(axes: Axes) -> None:
    """Replace the horizontal grid lines by vertical ones, for horizontal bars."""
    axes.grid(False)
    axes.grid(axis="x", color=GRID, lw=0.8)


def color(name: str) -> str:
    """Return the color of looks.PALETTE for a light background."""
    return PALETTE[name][0]


def add_legend_below(figure: Figure, handles: Sequence[Artist], columns: int = 5) -> None:
    """Add a legend under the panels."""
    figure.legend(
        handles=handles, loc="outside lower center", ncols=columns, fontsize=8, handlelength=1.6, columnspacing=1.6
    )


def png(figure: Figure) -> bytes:
    """Return the figure as PNG, without metadata that depends on the version."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()
