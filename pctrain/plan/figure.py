"""Memory of each layout by part, as a PNG: one bar per layout, and the limit of the GPU."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

from pctrain.files.durable import write_atomically
from pctrain.plan.gpus import GIB
from pctrain.plan.memory import PARTS
from pctrain.plan.planner import Plan

COLOURS = {
    "weights": "#2f6f9f",
    "gradients": "#7fb2d6",
    "optimizer": "#1b3f5c",
    "reference": "#9a6fb0",
    "engine": "#4f9d69",
    "activations": "#d98a3d",
    "logits": "#b5651d",
    "workspace": "#f0c08a",
    "stream": "#8fc7a1",
    "checkpoint": "#7a6a58",
    "reserve": "#c3cad2",
}


def draw(path: Path, plans: Sequence[Plan]) -> None:
    """Draw each layout at its fullest moment. The file is replaced atomically."""
    import matplotlib
    from matplotlib.figure import Figure

    from pctrain.report.looks import STYLE

    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(8.6, 1.4 + 0.42 * len(plans)), layout="constrained")
        axes = figure.subplots()
        peaks = [plan.memory.peak for plan in plans]
        left = [0.0] * len(plans)
        for name in (name for name in PARTS if any(name in peak.parts for peak in peaks)):
            widths = [peak.parts.get(name, 0.0) / GIB for peak in peaks]
            axes.barh(range(len(plans)), widths, left=left, color=COLOURS[name], label=name, height=0.66)
            left = [a + b for a, b in zip(left, widths, strict=True)]
        axes.axvline(plans[0].gpu.memory / GIB, color="#b3261e", lw=1.4, label=f"{plans[0].gpu.name}")
        axes.set_yticks(
            range(len(plans)),
            [f"{plan.name}\n{plan.layout.parallel.recompute}, {plan.memory.peak.phase}" for plan in plans],
            fontsize=8,
        )
        axes.invert_yaxis()
        axes.set(xlabel="GiB on the fullest GPU", title="Memory at its fullest moment")
        axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), fontsize=8.5)
        image = io.BytesIO()
        figure.savefig(image, format="png", metadata={"Software": None})
    write_atomically(path, image.getvalue())
