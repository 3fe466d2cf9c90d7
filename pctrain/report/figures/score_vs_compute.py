"""The figure of score against total training compute: RL runs with their fits, pure SFT, one panel per set."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from pctrain.report.charts.chart import Chart
from pctrain.report.figures.panels import DASHED, add_legend_below, color, make_panels
from pctrain.report.looks import MARKERS, MUTED

MAX_DIRECT_LABELS = 6  # lines; more get a legend instead of labels at their ends
MAX_ERROR_BARS = 40  # points; more are drawn without error bars


def draw(chart: Chart) -> Figure:
    """Draw the figure."""
    spec = chart.spec
    sets = spec["sets"] or [None]
    figure, panels = make_panels(chart, len(sets))
    for set_name, axes in zip(sets, panels, strict=True):
        in_panel = [series for series in spec["series"] if set_name is None or series["set"] in (set_name, "")]
        _draw_panel(axes, in_panel, spec["means"])
        axes.set(xlabel=spec["x"], ylabel=spec["y"] if axes is panels[0] else "", xlim=(0, None))
        if set_name is not None:
            axes.set_title(set_name)
        _name_lines(axes, in_panel, direct=set_name is None)
    add_legend_below(figure, _legend(spec["series"]), columns=3)
    return figure


# ---- lines and points


def _draw_panel(axes: Axes, in_panel: Sequence[dict[str, Any]], means: Sequence[dict[str, Any]]) -> None:
    for series in in_panel:
        if series["seeded"]:
            _draw_seed(axes, series, means)
        else:
            _draw_run(axes, series)
    scores = [y for series in in_panel for y in series["y"]]
    axes.set_ylim(max(0, min(scores) - 4), min(101, max(scores) + 4))


def _draw_seed(axes: Axes, series: dict[str, Any], means: Sequence[dict[str, Any]]) -> None:
    """Draw the points of one seed; the first seed of a group also draws the mean over its seeds."""
    own = color(series["alone"])
    axes.plot(_total(series), series["y"], ls="", marker=MARKERS[series["marker"]], ms=3.5, color=own, alpha=0.35)
    if not series["first"]:
        return
    for mean in means:
        if mean["group"] == series["group"]:
            x = _total(mean)
            axes.fill_between(x, mean["low"], mean["high"], color=own, alpha=0.18, lw=0)
            axes.plot(x, mean["y"], color=own, lw=2)


def _draw_run(axes: Axes, series: dict[str, Any]) -> None:
    x, own = _total(series), color(series["alone"])
    fit, equal = series.get("fit"), series.get("equal")
    if fit:
        fit_x = [series["switch_point"] + value for value in fit["x"]]
        axes.fill_between(fit_x, fit["low"], fit["high"], color=own, alpha=0.14, lw=0, zorder=2)
        axes.plot(fit_x, fit["median"], color=own, lw=2, ls="-" if fit["identified"] else DASHED, zorder=6)
    elif series["kind"] == "sft":
        axes.plot(x, series["y"], color=own, lw=1.6, zorder=4)
    else:
        axes.plot(x, series["y"], color=own, lw=1, alpha=0.6, zorder=4)
    axes.errorbar(
        x,
        series["y"],
        yerr=series["se"] if len(x) <= MAX_ERROR_BARS else None,
        color=own,
        ls="",
        marker=MARKERS[series["marker"]],
        ms=_marker_size(len(x)),
        mec="white",
        mew=0.5,
        elinewidth=0.8,
        alpha=0.75 if len(x) <= 30 else 0.4,
        zorder=5,
    )
    if equal:
        axes.plot(x[-1], equal["y"], marker="D", ms=6.5, mfc="white", mec=own, mew=1.5, zorder=7)


def _marker_size(points: int) -> float:
    if points <= 12:
        return 5.5
    return 4 if points <= MAX_ERROR_BARS else 2.5


def _total(series: dict[str, Any]) -> list[float]:
    """Return the total compute of every point: that of the switch point plus RL."""
    return [series["switch_point"] + value for value in series["x"]]


# ---- names of lines


def _name_lines(axes: Axes, in_panel: Sequence[dict[str, Any]], direct: bool) -> None:
    """Label a few lines at their ends if `direct`, otherwise add a legend."""
    groups = list({series["group"]: series for series in in_panel}.values())
    if direct and len(groups) <= MAX_DIRECT_LABELS:
        axes.set_xlim(0, 1.02 * max(_total(series)[-1] for series in in_panel))
        _label_ends(axes, groups)
        return
    handles = [
        Line2D([], [], color=color(s["alone"]), marker=MARKERS[s["marker"]], ms=4, lw=1.4, label=s["group"])
        for s in groups
    ]
    axes.legend(handles=handles, fontsize=7, loc="lower right")


def _label_ends(axes: Axes, groups: Sequence[dict[str, Any]]) -> None:
    """Add labels right of the axes, spread out, each connected to the end of its line."""
    bottom, top = axes.get_ylim()
    ends = [series["fit"]["median"][-1] if series.get("fit") else series["y"][-1] for series in groups]
    heights = spread_out(ends, 0.065 * (top - bottom), bottom, top)
    for series, end, height in zip(groups, ends, heights, strict=True):
        own = color(series["alone"])
        axes.annotate(
            series["group"],
            (_total(series)[-1], end),
            xycoords="data",
            xytext=(1.02, height),
            textcoords=("axes fraction", "data"),
            va="center",
            ha="left",
            fontsize=9,
            color=own,
            fontweight="bold",
            annotation_clip=False,
            arrowprops={"arrowstyle": "-", "color": own, "lw": 0.7, "alpha": 0.4, "shrinkA": 2, "shrinkB": 4},
        )


def spread_out(values: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Move `values` apart until neighbors are at least `gap` apart, within [low, high] if they fit.

    One pass moves values up and one moves them down, each as little as the gap needs. The order is kept.
    """
    order = sorted(range(len(values)), key=lambda i: values[i])
    placed = list(values)
    lowest = low
    for i in order:
        placed[i] = max(placed[i], lowest)
        lowest = placed[i] + gap
    highest = high
    for i in reversed(order):
        placed[i] = min(placed[i], highest)
        highest = placed[i] - gap
    return placed


def _legend(all_series: Sequence[dict[str, Any]]) -> list[Artist]:
    handles: list[Artist] = []
    if any(series.get("fit") for series in all_series):
        handles += [
            Line2D([], [], color=MUTED, lw=1.8, label="fit, ceiling identified"),
            Line2D([], [], color=MUTED, lw=1.8, ls=DASHED, label="fit, ceiling not identified"),
            Patch(color=MUTED, alpha=0.25, lw=0, label="90% interval of the curve"),
        ]
    if any(series.get("equal") for series in all_series):
        label = "pure SFT at equal total compute"
        handles.append(Line2D([], [], ls="", marker="D", mfc="white", mec=MUTED, mew=1.5, label=label))
    label = "± one standard error of a score"
    handles.append(Line2D([], [], ls="", marker="|", ms=11, mew=1.2, color=MUTED, label=label))
    return handles
