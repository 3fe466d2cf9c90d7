"""The figure of the validation loss: regimes as bands for one run, as colors of the points for several."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.patheffects import withStroke
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from pctrain.report.charts.chart import Chart
from pctrain.report.figures.panels import add_legend_below, color, make_panels
from pctrain.report.looks import INK, MARKERS, MUTED, REGIME_COLOURS

LOG_TICKS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 1, 1.5, 2, 3, 5, 7, 10, 20, 50)
LOG_RATIO = 4  # losses over a wider range than this get a logarithmic axis
DENSE = 60  # points from which on markers are drawn small


def draw(chart: Chart) -> Figure:
    """Draw the figure."""
    all_series = chart.spec["series"]
    several = len(all_series) > 1
    figure, (axes,) = make_panels(chart, 1)
    axes.set(xlabel=chart.spec["x"], ylabel=chart.spec["y"])
    limits = _set_loss_scale(axes, [y for series in all_series for y in series["y"]])
    for series in all_series:
        _draw_series(axes, series, several)
    first_x = all_series[0]["x"][0]
    ends = [series["x"][-1] for series in all_series]
    axes.set_xlim(min(series["x"][0] for series in all_series), max([*ends, first_x + 1e-9]))
    axes.set_ylim(*limits)
    if not several:
        _shade_regimes(axes, all_series[0])
        _draw_bounds(axes, all_series[0])
        _mark_starts(axes, all_series[0])
    add_legend_below(figure, _legend(all_series), columns=6)
    return figure


def _set_loss_scale(axes: Axes, losses: Sequence[float]) -> tuple[float, float]:
    """Return the y limits, with room for labels above.

    The axis becomes logarithmic if the first losses would otherwise flatten the rise of overfitting.
    """
    low, high = min(losses), max(losses)
    if low > 0 and high / low > LOG_RATIO:
        axes.set_yscale("log")
        ticks = [tick for tick in LOG_TICKS if low * 0.9 <= tick <= high * 1.1]
        axes.yaxis.set_major_locator(FixedLocator(ticks))
        axes.yaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.set_ylabel(axes.get_ylabel() + ", log scale")
        return low * (low / high) ** 0.08, high * (high / low) ** 0.14
    room = max(high - low, 0.02 * high, 1e-9)
    return low - 0.08 * room, high + 0.14 * room


def _draw_series(axes: Axes, series: dict[str, Any], several: bool) -> None:
    own = color(series["colour"])
    x = series["x"]
    y = series["y"]
    minimum = series["minimum"]
    fill = [REGIME_COLOURS[regime] for regime in series["regimes"]] if several else own
    axes.plot(x, y, color=own, lw=1.8, zorder=3)
    axes.scatter(x, y, s=12 if len(x) < DENSE else 4, c=fill, edgecolors=own, linewidths=0.7, zorder=4)
    axes.plot(minimum["x"], minimum["y"], "o", ms=14, mfc="none", mec=own, mew=1.3, zorder=5)
    if several:
        axes.annotate(
            series["name"],
            (x[-1], y[-1]),
            xytext=(6, 0),
            textcoords="offset points",
            va="center",
            fontsize=8.5,
            color=own,
            fontweight="bold",
            annotation_clip=False,
        )


def _shade_regimes(axes: Axes, series: dict[str, Any]) -> None:
    """Draw a band per regime, with its name if it fits."""
    span = _span(series)
    for band in series["bands"]:
        patch = axes.axvspan(band["from"], band["to"], color=REGIME_COLOURS[band["regime"]], alpha=0.20, lw=0)
        patch.set_gid(f"regime-{band['regime']}")
        if (band["to"] - band["from"]) / span > 0.012 * len(band["regime"]) + 0.02:
            axes.text(
                (band["from"] + band["to"]) / 2,
                0.975,
                band["regime"],
                transform=axes.get_xaxis_transform(),
                ha="center",
                va="top",
                fontsize=9,
            )


def _draw_bounds(axes: Axes, series: dict[str, Any]) -> None:
    """Draw the upper bounds of the stable and the mild regime."""
    for bound, side in zip(series["bounds"], ("top", "bottom"), strict=True):
        axes.axhline(bound, color=MUTED, lw=0.8, ls=(0, (2, 3)))
        axes.annotate(
            f"min + {100 * (bound / series['minimum']['y'] - 1):.3g}%",
            (1, bound),
            xycoords=("axes fraction", "data"),
            xytext=(4, 0),
            textcoords="offset points",
            va=side,
            fontsize=7.5,
            color=MUTED,
        )


def _mark_starts(axes: Axes, series: dict[str, Any]) -> None:
    """Draw a marker with a label at every RL start. Needs the final limits of the axes."""
    span = _span(series)
    previous, level = float("-inf"), 0
    for start in series["starts"]:
        close = start["x"] - previous < 0.2 * span
        level = level + 1 if close else 0  # labels of close neighbors are one above the other
        previous = start["x"]
        _mark_start(axes, start, level, is_late=start["x"] > axes.get_xlim()[0] + 0.8 * span)


def _mark_start(axes: Axes, start: dict[str, Any], level: int, is_late: bool) -> None:
    at, own = (start["x"], start["y"]), color(start["colour"])
    is_high = axes.transAxes.inverted().transform(axes.transData.transform(at))[1] > 0.75
    axes.plot(*at, marker=MARKERS[start["marker"]], ms=8, color=own, mec="white", mew=1.2, zorder=6, clip_on=False)
    axes.annotate(
        start["name"].replace("RL from ", "RL from\n"),
        at,
        textcoords="offset points",
        xytext=(-8 if is_late else 4, -26 if is_high else 28 + 26 * level),
        ha="right" if is_late else "left",
        va="top" if is_high else "bottom",
        fontsize=8.5,
        fontweight="bold",
        color=own,
        path_effects=[withStroke(linewidth=2.5, foreground="white", alpha=0.75)],
        zorder=7,
        arrowprops={
            "arrowstyle": "-",
            "color": own,
            "lw": 0.9,
            "shrinkB": 6,
            "shrinkA": 1,
            "relpos": (float(is_late), float(is_high)),
        },
    )


def _span(series: dict[str, Any]) -> float:
    return max(series["x"][-1] - series["x"][0], 1e-30)


def _legend(all_series: Sequence[dict[str, Any]]) -> list[Artist]:
    present = {regime for series in all_series for regime in series["regimes"]}
    handles: list[Artist] = [
        Patch(color=fill, alpha=0.35, lw=0, label=regime)
        for regime, fill in REGIME_COLOURS.items()
        if regime in present
    ]
    label = "minimum" if len(all_series) > 1 else f"minimum, step {all_series[0]['minimum']['step']}"
    handles.append(Line2D([], [], ls="", marker="o", ms=9, mfc="none", mec=INK, mew=1.3, label=label))
    return handles
