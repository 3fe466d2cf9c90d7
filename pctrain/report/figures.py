"""The report's charts as PNG, drawn with matplotlib from their specs (charts.py); no pyplot, no display, the same bytes for the same
numbers. Several sets, or benchmarks, stand beside each other in panels of one scale.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.patheffects import withStroke
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from pctrain.report.charts import Chart
from pctrain.report.looks import BASE, GRID, INK, MARKERS, MUTED, PALETTE, REGIME_COLOURS, STYLE

DASHED = (0, (4, 2))


def draw_all(charts: Sequence[Chart]) -> dict[str, bytes]:
    """`{file name: PNG}`."""
    drawn = {
        "validation_loss": validation_loss,
        "score_vs_compute": score_vs_compute,
        "ceilings": ceilings,
        "ceiling_vs_loss": ceiling_vs_loss,
        "benchmarks": benchmarks,
        "compute": compute,
    }
    with matplotlib.rc_context(STYLE):
        return {f"{chart.name}.png": _png(drawn[chart.name](chart)) for chart in charts}


def validation_loss(chart: Chart) -> Figure:
    """Validation loss against SFT compute; the regimes of the one run shaded, those of several in the colours of their points."""
    spec, several = chart.spec, len(chart.spec["series"]) > 1
    figure, (axes,) = _panels(chart, 1)
    axes.set(xlabel=spec["x"], ylabel=spec["y"])
    low, high = _loss_axis(axes, [y for s in spec["series"] for y in s["y"]])
    seen: list[str] = []
    for series in spec["series"]:
        colour = _hex(series["colour"])
        x, y = series["x"], series["y"]
        seen += series["regimes"]
        axes.plot(x, y, color=colour, lw=1.8, zorder=3)
        edge = [REGIME_COLOURS[regime] for regime in series["regimes"]] if several else colour
        axes.scatter(x, y, s=12 if len(x) < 60 else 4, c=edge, edgecolors=colour, linewidths=0.7, zorder=4)
        axes.plot(series["minimum"]["x"], series["minimum"]["y"], "o", ms=14, mfc="none", mec=colour, mew=1.3, zorder=5)
        if several:
            axes.annotate(
                series["name"],
                (x[-1], y[-1]),
                xytext=(6, 0),
                textcoords="offset points",
                va="center",
                fontsize=8.5,
                color=colour,
                fontweight="bold",
                annotation_clip=False,
            )
    first = spec["series"][0]
    axes.set_xlim(
        min(s["x"][0] for s in spec["series"]), max([s["x"][-1] for s in spec["series"]] + [first["x"][0] + 1e-9])
    )
    axes.set_ylim(low, high)
    if not several:
        _shade(axes, first)
    handles = [
        Patch(color=colour, alpha=0.35, lw=0, label=name) for name, colour in REGIME_COLOURS.items() if name in seen
    ]
    handles.append(
        Line2D(
            [],
            [],
            ls="",
            marker="o",
            ms=9,
            mfc="none",
            mec=INK,
            mew=1.3,
            label="minimum" if several else f"minimum, step {first['minimum']['step']}",
        )
    )
    _legend_below(figure, handles, columns=6)
    return figure


def _shade(axes: Axes, series: dict[str, Any]) -> None:
    """Bands of the regimes, their two bounds, and a marker with a label at every RL start. Needs the final limits."""
    span = max(series["x"][-1] - series["x"][0], 1e-30)
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
    for bound, side in zip(series["bounds"], ("top", "bottom"), strict=True):
        axes.axhline(bound, color=MUTED, lw=0.8, ls=(0, (2, 3)))
        axes.annotate(
            f"min + {100 * (bound / series['minimum']['y'] - 1):.3g} %",
            (1, bound),
            xycoords=("axes fraction", "data"),
            xytext=(4, 0),
            textcoords="offset points",
            va=side,
            fontsize=7.5,
            color=MUTED,
        )
    previous, level = float("-inf"), 0
    for start in series["starts"]:  # labels of close neighbours stand one above the other
        at, height = start["x"], start["y"]
        level = level + 1 if at - previous < 0.2 * span else 0
        previous = at
        late = at > axes.get_xlim()[0] + 0.8 * span
        high = axes.transAxes.inverted().transform(axes.transData.transform((at, height)))[1] > 0.75
        colour = _hex(start["colour"])
        axes.plot(
            at,
            height,
            marker=MARKERS[start["marker"]],
            ms=8,
            color=colour,
            mec="white",
            mew=1.2,
            zorder=6,
            clip_on=False,
        )
        halo = withStroke(linewidth=2.5, foreground="white", alpha=0.75)
        line = {
            "arrowstyle": "-",
            "color": colour,
            "lw": 0.9,
            "shrinkB": 6,
            "shrinkA": 1,
            "relpos": (float(late), float(high)),
        }
        axes.annotate(
            start["name"].replace("RL from ", "RL from\n"),
            (at, height),
            textcoords="offset points",
            xytext=(-8 if late else 4, -26 if high else 28 + 26 * level),
            ha="right" if late else "left",
            va="top" if high else "bottom",
            fontsize=8.5,
            fontweight="bold",
            color=colour,
            path_effects=[halo],
            zorder=7,
            arrowprops=line,
        )


def _loss_axis(axes: Axes, loss: Sequence[float]) -> tuple[float, float]:
    """Logarithmic where the start would press the rise of overfitting flat; returns the limits, with room for labels above."""
    low, high = min(loss), max(loss)
    if low > 0 and high / low > 4:
        axes.set_yscale("log")
        ticks = [
            t
            for t in (0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 1, 1.5, 2, 3, 5, 7, 10, 20, 50)
            if low * 0.9 <= t <= high * 1.1
        ]
        axes.yaxis.set_major_locator(FixedLocator(ticks))
        axes.yaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.set_ylabel(axes.get_ylabel() + ", log scale")
        return low * (low / high) ** 0.08, high * (high / low) ** 0.14
    room = max(high - low, 0.02 * high, 1e-9)
    return low - 0.08 * room, high + 0.14 * room


def score_vs_compute(chart: Chart) -> Figure:
    """Score against total training compute: RL runs with their fits, pure SFT beside them; a panel a set."""
    spec = chart.spec
    sets = spec["sets"] or [None]
    figure, panels = _panels(chart, len(sets))
    for name, axes in zip(sets, panels):
        shown = [s for s in spec["series"] if name is None or s["set"] in (name, "")]
        for series in shown:
            _score_series(axes, series, _hex(series["alone"]), spec["means"])
        axes.set(xlabel=spec["x"], ylabel=spec["y"] if axes is panels[0] else "", xlim=(0, None))
        if name is not None:
            axes.set_title(name)
        ys = [y for s in shown for y in s["y"]]
        axes.set_ylim(max(0, min(ys) - 4), min(101, max(ys) + 4))
        groups = list({s["group"]: s for s in shown}.values())
        if name is None and len(groups) <= 6:
            axes.set_xlim(0, 1.02 * max(s["joint"] + s["x"][-1] for s in shown))
            _label_ends(
                axes,
                [
                    (
                        s["joint"] + s["x"][-1],
                        s["fit"]["median"][-1] if s.get("fit") else s["y"][-1],
                        s["group"],
                        _hex(s["alone"]),
                    )
                    for s in groups
                ],
            )
        else:
            handles = [
                Line2D([], [], color=_hex(s["alone"]), marker=MARKERS[s["marker"]], ms=4, lw=1.4, label=s["group"])
                for s in groups
            ]
            axes.legend(handles=handles, fontsize=7, loc="lower right")
    fitted = any(s.get("fit") for s in spec["series"])
    keys = (
        [
            Line2D([], [], color=MUTED, lw=1.8, label="fit, ceiling identified"),
            Line2D([], [], color=MUTED, lw=1.8, ls=DASHED, label="fit, ceiling not identified"),
            Patch(color=MUTED, alpha=0.25, lw=0, label="90 % interval of the curve"),
        ]
        if fitted
        else []
    )
    if any(s.get("equal") for s in spec["series"]):
        keys.append(Line2D([], [], ls="", marker="D", mfc="white", mec=MUTED, mew=1.5, label="pure SFT at equal total"))
    keys.append(Line2D([], [], ls="", marker="|", ms=11, mew=1.2, color=MUTED, label="± one standard error of a score"))
    _legend_below(figure, keys, columns=3)
    return figure


def _score_series(axes: Axes, series: dict[str, Any], colour: str, means: Sequence[dict[str, Any]]) -> None:
    x, y = [series["joint"] + value for value in series["x"]], series["y"]
    if series["seeded"]:
        axes.plot(x, y, ls="", marker=MARKERS[series["marker"]], ms=3.5, color=colour, alpha=0.35)
        for mean in (mean for mean in means if mean["group"] == series["group"] and series["first"]):
            at = [mean["joint"] + value for value in mean["x"]]
            axes.fill_between(at, mean["low"], mean["high"], color=colour, alpha=0.18, lw=0)
            axes.plot(at, mean["y"], color=colour, lw=2)
        return
    fit = series.get("fit")
    if fit:
        at = [series["joint"] + value for value in fit["x"]]
        axes.fill_between(at, fit["low"], fit["high"], color=colour, alpha=0.14, lw=0, zorder=2)
        axes.plot(at, fit["median"], color=colour, lw=2, ls="-" if fit["identified"] else DASHED, zorder=6)
    else:
        axes.plot(
            x,
            y,
            color=colour,
            lw=1.6 if series["kind"] == "sft" else 1,
            alpha=1 if series["kind"] == "sft" else 0.6,
            zorder=4,
        )
    axes.errorbar(
        x,
        y,
        yerr=series["se"] if len(x) <= 40 else None,
        color=colour,
        ls="",
        marker=MARKERS[series["marker"]],
        ms=5.5 if len(x) <= 12 else 4 if len(x) <= 40 else 2.5,
        mec="white",
        mew=0.5,
        elinewidth=0.8,
        alpha=0.75 if len(x) <= 30 else 0.4,
        zorder=5,
    )
    if series.get("equal"):
        axes.plot(x[-1], series["equal"]["y"], marker="D", ms=6.5, mfc="white", mec=colour, mew=1.5, zorder=7)


def _label_ends(axes: Axes, ends: Sequence[tuple[float, float, str, str]]) -> None:
    """Direct labels right of the axes, pushed apart, each joined to the end of its line."""
    bottom, top = axes.get_ylim()
    heights = _spread([y for _, y, _, _ in ends], 0.065 * (top - bottom), bottom, top)
    for (x, y, text, colour), height in zip(ends, heights):
        axes.annotate(
            text,
            (x, y),
            xycoords="data",
            xytext=(1.02, height),
            textcoords=("axes fraction", "data"),
            va="center",
            ha="left",
            fontsize=9,
            color=colour,
            fontweight="bold",
            annotation_clip=False,
            arrowprops={"arrowstyle": "-", "color": colour, "lw": 0.7, "alpha": 0.4, "shrinkA": 2, "shrinkB": 4},
        )


def _spread(values: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """`values` moved as little as a forward and a backward pass need for `gap` between neighbours, kept in [low, high] where they fit."""
    order = sorted(range(len(values)), key=lambda i: values[i])
    placed = list(values)
    for previous, i in zip([None, *order], order):
        placed[i] = max(placed[i], low if previous is None else placed[previous] + gap)
    for following, i in zip([None, *order[::-1]], order[::-1]):
        placed[i] = min(placed[i], high if following is None else placed[following] - gap)
    return placed


def ceilings(chart: Chart) -> Figure:
    """P_sft + PL_rl per checkpoint (the paper's Figure 3), the 90 % interval as an error bar, the verdict beside each."""
    spec, bars = chart.spec, chart.spec["bars"]
    figure, (axes,) = _panels(chart, 1, height=1.9 + (0.62 if len(bars) < 8 else 0.42) * len(bars))
    begin = spec["begin"]
    axes.set_xlabel(spec["x"] + (f"; the axis begins at {begin:g}" if begin else ""))
    axes.grid(False)
    axes.grid(axis="x", color=GRID, lw=0.8)
    axes.set_xlim(begin, 100)
    for row, bar in enumerate(bars):
        _ceiling_bar(axes, row, bar, begin)
    axes.set_yticks(range(len(bars)), [bar["name"].removeprefix("RL from ").replace(" (", "\n(") for bar in bars])
    axes.tick_params(axis="y", length=0)
    axes.invert_yaxis()
    _legend_below(
        figure,
        [
            Patch(color=BASE, label="P_sft, before RL"),
            Patch(color=MUTED, label="PL_rl, ceiling identified"),
            Patch(facecolor="#e3e6e9", edgecolor=MUTED, lw=0, hatch="////", label="PL_rl, not identified"),
            Patch(facecolor="none", edgecolor=MUTED, ls=(0, (2, 2)), label="measured gain, no ceiling"),
        ],
    )
    return figure


def _ceiling_bar(axes: Axes, row: int, bar: dict[str, Any], begin: float) -> None:
    base, colour, ceiling = bar["p_sft"], _hex(bar["colour"]), bar["ceiling"]
    width = axes.get_xlim()[1] - begin
    axes.barh(row, base - begin, left=begin, height=0.56, color=BASE)
    inside = base - begin > 0.12 * width
    axes.text(
        (begin + base) / 2 if inside else begin + 0.01 * width,
        row,
        f"{base:.1f}",
        ha="center" if inside else "left",
        va="center",
        fontsize=9,
    )
    if ceiling:
        top = max(ceiling["a"], base)
        axes.barh(
            row,
            top - base,
            left=base,
            height=0.56,
            color=colour,
            alpha=0.85 if bar["solid"] else 0.28,
            hatch=None if bar["solid"] else "////",
            edgecolor="white" if bar["solid"] else colour,
            lw=0,
        )
        if bar["solid"] and top - base > 0.08 * width:
            axes.text(
                base + 0.012 * width,
                row,
                f"{ceiling['a'] - base:+.1f}",
                ha="left",
                va="center",
                fontsize=9,
                color="white",
                fontweight="bold",
            )
        axes.plot([ceiling["low"], ceiling["high"]], [row, row], color=INK, lw=1.3, zorder=5)
        axes.plot(ceiling["low"], row, marker="|", ms=9, mew=1.3, color=INK, zorder=5)
        # An arrow where only the lower end means anything.
        end = {"marker": ">", "ms": 5} if ceiling["verdict"] == "lower_bound" else {"marker": "|", "ms": 9}
        axes.plot(ceiling["high"], row, mew=1.3, color=INK, zorder=5, clip_on=False, **end)
    elif bar["measured"] > base:
        axes.barh(
            row,
            bar["measured"] - base,
            left=base,
            height=0.56,
            facecolor="none",
            edgecolor=colour,
            lw=1.2,
            ls=(0, (2, 2)),
        )
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


def ceiling_vs_loss(chart: Chart) -> Figure:
    spec = chart.spec
    figure, (axes,) = _panels(chart, 1)
    axes.set(xlabel=spec["x"], ylabel=spec["y"])
    for p in spec["points"]:
        colour = _hex(p["colour"])
        axes.errorbar(
            p["x"],
            p["y"],
            yerr=[[p["y"] - p["low"]], [p["high"] - p["y"]]],
            color=colour,
            marker="o",
            ms=8,
            capsize=4,
            mfc=colour if p["verdict"] == "identified" else "white",
            mew=1.6,
        )
        axes.annotate(
            p["name"],
            (p["x"], p["y"]),
            xytext=(8, 6),
            textcoords="offset points",
            color=colour,
            fontweight="bold",
            fontsize=9,
        )
    axes.margins(x=0.2, y=0.15)
    return figure


def benchmarks(chart: Chart) -> Figure:
    """A panel a benchmark."""
    spec = chart.spec
    figure, panels = _panels(chart, len(spec["names"]), share_y=False)
    for name, axes in zip(spec["names"], panels):
        for series in spec["series"]:
            y = [float("nan") if value is None else value for value in series["y"][name]]
            axes.plot(
                series["x"],
                y,
                color=_hex(series["colour"]),
                lw=1.2 if series["kind"] == "rl" else 1.8,
                alpha=0.8,
                marker=MARKERS[series["marker"]],
                ms=2.5,
            )
        axes.set_title(name)
        axes.set(xlabel=spec["x"], ylabel=spec["y"])
    groups = {s["group"]: s for s in spec["series"]}
    shown = {s["set"] or s["group"]: s for s in spec["series"]} if spec["sets"] else groups
    _legend_below(
        figure,
        [
            Line2D([], [], color=_hex(s["colour"]), marker=MARKERS[s["marker"]], ms=4, label=name)
            for name, s in shown.items()
        ],
        columns=4,
    )
    return figure


def compute(chart: Chart) -> Figure:
    """Where the compute went, by phase and run, in the exact count and by the paper's formulas."""
    spec = chart.spec
    metrics = [m for m in spec["metrics"] if m["key"] in ("exact_flops", "paper_flops")] or spec["metrics"][:1]
    figure, panels = _panels(chart, len(metrics), height=1.9 + 0.42 * len(spec["phases"]))
    for metric, axes in zip(metrics, panels):
        axes.set_title(metric["title"])
        axes.set_xlabel(metric["unit"])
        axes.grid(False)
        axes.grid(axis="x", color=GRID, lw=0.8)
        totals = [0.0] * len(spec["phases"])
        for run, values in zip(spec["runs"], metric["values"]):
            for row, value in enumerate(values):
                axes.barh(
                    row,
                    value,
                    left=totals[row],
                    height=0.62,
                    color=_hex(run["colour"]),
                    alpha=0.45 if spec["measuring"][row] else 1,
                    edgecolor="white",
                    lw=0.4,
                )
                totals[row] += value
        for row, value in enumerate(totals):
            axes.text(value, row, f" {value:.3g}", va="center", fontsize=8)
        axes.set_xlim(0, 1.16 * max(totals) or 1)
        axes.tick_params(axis="y", length=0)
    names = [name + (" *" if measuring else "") for name, measuring in zip(spec["phases"], spec["measuring"])]
    panels[0].set_yticks(range(len(names)), names)  # the panels share their rows
    panels[0].set_ylim(len(names) - 0.5, -0.5)
    kinds = {run["name"]: run for run in spec["runs"][:12]}
    _legend_below(figure, [Patch(color=_hex(run["colour"]), label=name) for name, run in kinds.items()], columns=4)
    return figure


# -- shared looks ------------------------------------------------------------------------------------------------------------------


def _panels(chart: Chart, count: int, height: float = 4.6, share_y: bool = True) -> tuple[Figure, list[Axes]]:
    """A figure of up to three panels in a row, one scale for a row."""
    columns = min(count, 3)
    rows = -(-count // columns)
    figure = Figure(
        figsize=(8.4 if count == 1 else 4.4 * columns, height if rows == 1 else 3.2 * rows + 0.8), layout="constrained"
    )
    figure.get_layout_engine().set(w_pad=0.12, h_pad=0.07)
    axes = figure.subplots(rows, columns, sharey=share_y and count > 1, squeeze=False).ravel()
    for place in axes:
        place.grid(axis="y", color=GRID, lw=0.8)
        place.tick_params(length=3)
    for place in axes[count:]:
        place.remove()
    figure.suptitle(chart.title, x=0.01, ha="left", fontsize=12, fontweight="bold")
    return figure, list(axes[:count])


def _hex(colour: str) -> str:
    return PALETTE[colour][0]


def _legend_below(figure: Figure, handles: list, columns: int = 5) -> None:
    figure.legend(
        handles=handles, loc="outside lower center", ncols=columns, fontsize=8, handlelength=1.6, columnspacing=1.6
    )


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()
