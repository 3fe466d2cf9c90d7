"""scores.png: a panel for each benchmark and for the mean over problems, with every model's point and interval."""

from __future__ import annotations

import io
from collections.abc import Mapping

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from pctrain.evaluate.statistics import Estimate
from pctrain.evaluate.summary import MEANS, Scores, means
from pctrain.report.looks import GRID, PALETTE, STYLE

COLUMNS = 4


def draw(scores: Mapping[str, Mapping[str, Scores]]) -> bytes:
    """Return a PNG; the same numbers give the same bytes. `scores`: {model: {benchmark: Scores}}."""
    names = list(next(iter(scores.values())))
    panels = {name: {model: by_benchmark[name].average() for model, by_benchmark in scores.items()} for name in names}
    if len(names) > 1:
        panels[MEANS["weighted"]] = {
            model: means(list(by_benchmark.values()))["weighted"] for model, by_benchmark in scores.items()
        }
    columns = min(COLUMNS, len(panels))
    rows = -(-len(panels) // columns)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(1.2 + 2.6 * columns, 0.9 + rows * (1.2 + 0.32 * len(scores))), layout="constrained")
        grid = figure.subplots(rows, columns, squeeze=False, sharey=True)
        places = list(grid.flat)
        for axes, (name, by_model) in zip(places, panels.items(), strict=False):
            _panel(axes, name, by_model, headline=name == MEANS["weighted"])
        for axes in places[len(panels) :]:
            axes.remove()
        figure.supxlabel("Percent correct, 95% interval", fontsize=9)
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()


def _panel(axes: Axes, name: str, by_model: Mapping[str, Estimate], headline: bool) -> None:
    """Draw one panel, with the first model at the top, as in the table."""
    colour = PALETTE["vermillion" if headline else "blue"][0]
    places = range(len(by_model))
    values = [100 * estimate.value for estimate in by_model.values()]
    below = [100 * (estimate.value - estimate.low) for estimate in by_model.values()]
    above = [100 * (estimate.high - estimate.value) for estimate in by_model.values()]
    axes.errorbar(values, places, xerr=[below, above], fmt="o", ms=4, lw=1.4, capsize=2.5, color=colour)
    axes.grid(axis="x", color=GRID, lw=0.8)
    axes.set(title=name)
    axes.set_yticks(places, list(by_model))
    axes.set_ylim(len(by_model) - 0.5, -0.5)
