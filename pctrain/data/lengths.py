"""The lengths of records that `pctrain data check` measures: collection, statistics, table, histogram and picture."""

from __future__ import annotations

import io
from array import array
from collections.abc import Sequence
from typing import Any

import numpy as np
from rich import box
from rich.table import Table

BAR_WIDTH = 40
# Okabe and Ito's colors, which readers with color blindness can distinguish.
INK = "#1f2328"
MUTED = "#656d76"
FILL = "#56b4e9"
MEDIAN = "#0072b2"
HIGH = "#d55e00"
LIMIT = "#8c959f"
STYLE = {
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": "#9aa1a9",
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlelocation": "left",
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "legend.frameon": False,
    "savefig.dpi": 160,
}


class Lengths:
    """The lengths of prompts, responses and whole samples, in characters, and also in tokens if there is a model.

    `context` is the model's context in tokens, or None without a model. A problem has no response; its length is stored
    as -1.
    """

    def __init__(self, context: int | None):
        self.context = context
        self.unit = "characters" if context is None else "tokens"
        names = ["prompt, characters", "response, characters"]
        if context is not None:
            names += ["prompt, tokens", "response, tokens", "sample, tokens"]
        self._values = {name: array("q") for name in names}

    def add(self, prompt: str, response: str | None, tokens: tuple[int, int] | None) -> None:
        """Measure one record. `tokens` are those of the prompt and of the response with EOS (0 for a problem)."""
        self._values["prompt, characters"].append(len(prompt))
        self._values["response, characters"].append(-1 if response is None else len(response))
        if tokens is not None:
            prompt_tokens, response_tokens = tokens
            self._values["prompt, tokens"].append(prompt_tokens)
            self._values["response, tokens"].append(response_tokens or -1)
            self._values["sample, tokens"].append(prompt_tokens + response_tokens)

    def values(self) -> dict[str, np.ndarray]:
        """Return int64 [n] for each name, in the order of the records; -1 means that the record has no such text."""
        return {name: np.array(values, np.int64) for name, values in self._values.items()}

    def statistics(self, chosen: np.ndarray | None = None) -> dict[str, dict[str, float] | None]:
        """Return the statistics of each length for the chosen records (bool [n]), or for all records."""
        return {
            name: _statistics(values if chosen is None else values[chosen]) for name, values in self.values().items()
        }

    def table(self) -> Table:
        """Return the statistics as a table for the terminal."""
        table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), show_edge=False)
        table.add_column("lengths", no_wrap=True)
        for name in ("records", "median", "95%", "largest", "sum"):
            table.add_column(name, justify="right", no_wrap=True)
        for name, figures in self.statistics().items():
            if figures is not None:
                table.add_row(name, *(f"{figure:,.0f}" for figure in figures.values()))
        return table

    def histogram_lines(self) -> list[str]:
        """Return a text histogram of the response lengths, or of the prompt lengths if there are only problems."""
        name, values = self._main()
        edges = bin_edges(values, bins=12)
        counts, _ = np.histogram(values, edges)
        width = len(f"{edges[-1] - 1:,}")
        lines = [f"{name}: number of records"]
        for low, high, count in zip(edges[:-1], edges[1:], counts, strict=True):
            mark = "█" * round(BAR_WIDTH * count / counts.max()) or ("▏" if count else "")
            lines.append(f"  {low:>{width},} - {high - 1:<{width},} {mark} {count:,}")
        return lines

    def _main(self) -> tuple[str, np.ndarray]:
        all_values = self.values()
        for name in (f"response, {self.unit}", f"prompt, {self.unit}"):
            values = all_values[name][all_values[name] >= 0]
            if len(values):
                break
        return name, values

    def picture(self, title: str) -> bytes:
        """Return a PNG with a histogram of each length, the median, the 95th percentile and the model's context."""
        import matplotlib  # takes a third of a second, and --help does not need it
        from matplotlib.figure import Figure

        panels: dict[str, np.ndarray] = {}
        for name, values in self.values().items():
            if name.endswith(self.unit) and (values >= 0).any():
                panels[name] = values[values >= 0]
        with matplotlib.rc_context(STYLE):
            figure = Figure(figsize=(1 + 3.8 * len(panels), 3.4), layout="constrained")
            all_axes = np.atleast_1d(figure.subplots(1, len(panels)))
            for axes, (name, values) in zip(all_axes, panels.items(), strict=True):
                _draw_panel(axes, name, values, self.context if name.startswith("sample") else None)
            figure.suptitle(title, x=0.01, ha="left", fontsize=9, color=MUTED, parse_math=False)
            buffer = io.BytesIO()
            figure.savefig(buffer, format="png", metadata={"Software": None})
            return buffer.getvalue()


def _statistics(values: np.ndarray) -> dict[str, float] | None:
    values = values[values >= 0]
    if not len(values):
        return None
    median, high = np.percentile(values, [50, 95])
    return {
        "records": len(values),
        "median": float(median),
        "percentile_95": float(high),
        "largest": int(values.max()),
        "sum": int(values.sum()),
    }


def bin_edges(values: np.ndarray, bins: int) -> np.ndarray:
    """Return whole numbers (int64, at least two) around all values, with about `bins` bins of equal ratio.

    No bin is narrower than the one before it. Rounding alone would give widths of 1 and 2 in turn, and a smooth curve
    would look jagged.
    """
    low, high = int(values.min()), int(values.max()) + 1
    ratio = (high / max(1, low)) ** (1 / bins)
    edges, width = [low], 1
    while edges[-1] < high:
        width = max(width, round(edges[-1] * (ratio - 1)))
        edges.append(min(high, edges[-1] + width))
    return np.array(edges)


def _draw_panel(axes: Any, name: str, values: np.ndarray, context: int | None) -> None:
    from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter, StrMethodFormatter

    text, unit = name.split(", ")
    axes.hist(values, bin_edges(values, bins=40) - 0.5, color=FILL, edgecolor="white", linewidth=0.4)
    median, high = np.percentile(values, [50, 95])
    axes.axvline(median, color=MEDIAN, lw=1.5, label=f"median {median:,.0f}")
    axes.axvline(high, color=HIGH, lw=1.5, ls="--", label=f"95% {high:,.0f}")
    if context is not None:
        axes.axvline(context, color=LIMIT, lw=1.5, ls=":", label=f"context {context:,}")
    if values.max() >= 10 * values.min():
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=_log_ticks(values)))
        axes.xaxis.set_minor_formatter(NullFormatter())
    else:
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    axes.set_title({"prompt": "Prompt", "response": "Response", "sample": "Whole sample"}[text])
    axes.set_xlabel(f"length ({unit})")
    axes.set_ylabel("records")
    axes.margins(y=0.25)  # room for the legend
    axes.legend(loc="upper left", fontsize=8, handlelength=1.6)


def _log_ticks(values: np.ndarray) -> Sequence[int]:
    """Return the multiples of each power of ten that get a tick."""
    return (1, 2, 5) if values.max() < 1000 * values.min() else (1,)
