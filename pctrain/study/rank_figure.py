"""The figure of `pctrain data rank`: the validation loss of each candidate, its band over seeds, its minimum."""

from __future__ import annotations

import io
from collections.abc import Sequence

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from pctrain.report.looks import GRID, MARKERS, OTHER_COLOURS, PALETTE, STYLE
from pctrain.study.ranking import Candidate


def draw(ranked: Sequence[Candidate]) -> bytes:
    """Return the figure as PNG, the same bytes for the same numbers.

    Each line is the mean over seeds; its band spans the seeds.
    """
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(8.4, 4.6), layout="constrained")
        axes = figure.add_subplot(
            title="Validation loss of the probes", xlabel="SFT step", ylabel="Validation loss (nats per token)"
        )
        axes.grid(axis="y", color=GRID, lw=0.8)
        for number, candidate in enumerate(ranked):
            colour, _ = PALETTE[OTHER_COLOURS[number % len(OTHER_COLOURS)]]
            marker = MARKERS[number % len(MARKERS)]
            steps = sorted(set.intersection(*(set(probe.losses) for probe in candidate.probes)))
            losses = np.array([[probe.losses[step] for step in steps] for probe in candidate.probes])
            axes.fill_between(steps, losses.min(0), losses.max(0), color=colour, alpha=0.2, lw=0)
            axes.plot(
                steps,
                losses.mean(0),
                color=colour,
                lw=1.8,
                marker=marker,
                ms=3,
                label=f"{number + 1}. {candidate.name}",
            )
            axes.axhline(candidate.mean, color=colour, lw=0.8, ls=(0, (4, 3)), alpha=0.7)
        low, high = _bounds([probe.losses for candidate in ranked for probe in candidate.probes])
        axes.set_ylim(low, high)
        axes.legend(title="dashed: mean minimum; band: over seeds", title_fontsize=8, fontsize=9)
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()


def _bounds(curves: Sequence[dict[int, float]]) -> tuple[float, float]:
    """Return the limits of the y axis.

    Losses of the first quarter of the steps count for the lower limit only: they are high above the rest, and the
    differences would be invisible.
    """
    lowest = min(min(losses.values()) for losses in curves)
    highest = max(loss for losses in curves for step, loss in losses.items() if step >= max(losses) / 4)
    margin = 0.06 * (highest - lowest) or 0.01
    return lowest - margin, highest + margin
