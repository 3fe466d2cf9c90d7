"""The figure of P_sft + PL_rl per checkpoint (figure 3 of arXiv 2512.11470), with the 90% interval and the verdict."""

from __future__ import annotations

from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from pctrain.report.charts.chart import Chart
from pctrain.report.figures.panels import BAR_HEIGHT, add_legend_below, color, make_panels, use_vertical_grid
from pctrain.report.looks import BASE, INK, MUTED

OUTLINE = (0, (2, 2))
HATCH = "////"


def draw(chart: Chart) -> Figure:
    """Draw the figure."""
    bars, begin = chart.spec["bars"], chart.spec["begin"]
    figure, (axes,) = make_panels(chart, 1, height=1.9 + (0.62 if len(bars) < 8 else 0.42) * len(bars))
    axes.set_xlabel(chart.spec["x"] + (f"; the axis begins at {begin:g}" if begin else ""))
    use_vertical_grid(axes)
    axes.set_xlim(begin, 100)
    for row, bar in enumerate(bars):
        _draw_base(axes, row, bar, begin)
        if bar["ceiling"]:
            _draw_ceiling(axes, row, bar, begin)
            _draw_interval(axes, row, bar["ceiling"])
        elif bar["measured"] > bar["p_sft"]:
            _draw_measured_gain(axes, row, bar)
        _write_verdict(axes, row, bar)
    axes.set_yticks(range(len(bars)), [bar["name"].removeprefix("RL from ").replace(" (", "\n(") for bar in bars])
    axes.tick_params(axis="y", length=0)
    axes.invert_yaxis()
    handles = [
        Patch(color=BASE, label="P_sft, before RL"),
        Patch(color=MUTED, label="PL_rl, ceiling identified"),
        Patch(facecolor="#e3e6e9", edgecolor=MUTED, lw=0, hatch=HATCH, label="PL_rl, not identified"),
        Patch(facecolor="none", edgecolor=MUTED, ls=OUTLINE, label="measured gain, no ceiling"),
    ]
    add_legend_below(figure, handles)
    return figure


def _width(axes: Axes, begin: float) -> float:
    return axes.get_xlim()[1] - begin


def _draw_base(axes: Axes, row: int, bar: dict[str, Any], begin: float) -> None:
    """Draw the bar of P_sft, with its value inside if it fits."""
    base, width = bar["p_sft"], _width(axes, begin)
    axes.barh(row, base - begin, left=begin, height=BAR_HEIGHT, color=BASE)
    fits = base - begin > 0.12 * width
    x = (begin + base) / 2 if fits else begin + 0.01 * width
    axes.text(x, row, f"{base:.1f}", ha="center" if fits else "left", va="center", fontsize=9)


def _draw_ceiling(axes: Axes, row: int, bar: dict[str, Any], begin: float) -> None:
    """Draw the bar of PL_rl, pale and hatched if the ceiling is not identified."""
    base = bar["p_sft"]
    own = color(bar["colour"])
    ceiling = bar["ceiling"]
    top, width = max(ceiling["a"], base), _width(axes, begin)
    if not bar["solid"]:
        axes.barh(
            row, top - base, left=base, height=BAR_HEIGHT, color=own, alpha=0.28, hatch=HATCH, edgecolor=own, lw=0
        )
        return
    axes.barh(row, top - base, left=base, height=BAR_HEIGHT, color=own, alpha=0.85, edgecolor="white", lw=0)
    if top - base > 0.08 * width:
        gain = f"{ceiling['a'] - base:+.1f}"
        axes.text(base + 0.012 * width, row, gain, ha="left", va="center", fontsize=9, color="white", fontweight="bold")


def _draw_interval(axes: Axes, row: int, ceiling: dict[str, Any]) -> None:
    """Draw the 90% interval, with an arrow if only its lower end carries information."""
    axes.plot([ceiling["low"], ceiling["high"]], [row, row], color=INK, lw=1.3, zorder=5)
    axes.plot(ceiling["low"], row, marker="|", ms=9, mew=1.3, color=INK, zorder=5)
    marker, size = (">", 5) if ceiling["verdict"] == "lower_bound" else ("|", 9)
    axes.plot(ceiling["high"], row, marker=marker, ms=size, mew=1.3, color=INK, zorder=5, clip_on=False)


def _draw_measured_gain(axes: Axes, row: int, bar: dict[str, Any]) -> None:
    gain, own = bar["measured"] - bar["p_sft"], color(bar["colour"])
    axes.barh(row, gain, left=bar["p_sft"], height=BAR_HEIGHT, facecolor="none", edgecolor=own, lw=1.2, ls=OUTLINE)


def _write_verdict(axes: Axes, row: int, bar: dict[str, Any]) -> None:
    axes.text(
        1.02,
        row,
        bar["text"].replace(", ", "\n", 1),
        transform=axes.get_yaxis_transform(),
        va="center",
        ha="left",
        fontsize=8.5,
        linespacing=1.3,
    )
