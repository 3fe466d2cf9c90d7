"""What `pctrain data check` shows: text for the terminal, a picture of the lengths, and all figures as JSON."""

from __future__ import annotations

import io
import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from pctrain.common.errors import UserError
from pctrain.data.check import Check, Trouble
from pctrain.files.durable import plain, write_beside

PICTURE, FIGURES = "lengths.png", "check.json"
MOST_FILES = 20  # lines of the table in the terminal; check.json has all
BAR_WIDTH = 40
INK, MUTED, FILL, MEDIAN, HIGH, LIMIT = (
    "#1f2328",
    "#656d76",
    "#56b4e9",
    "#0072b2",
    "#d55e00",
    "#8c959f",
)  # Okabe and Ito's
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


def write(found: Check, folder: Path) -> list[Path]:
    """`folder`/check.json, and `folder`/lengths.png where there is a record to measure."""
    files = {FIGURES: json.dumps(as_json(found), indent=1, ensure_ascii=False).encode() + b"\n"}
    if len(found.file_of):
        files[PICTURE] = picture(found)
    try:
        (folder / PICTURE).unlink(missing_ok=True)  # of an earlier check: it would be taken for this one's
        for name, content in files.items():
            write_beside(folder / name, content)
    except OSError as error:
        raise UserError(
            f"{folder}: the picture cannot be written ({error.strerror}); give another folder by --out DIR"
        ) from None
    return [folder / name for name in sorted(files, reverse=True)]


def as_json(found: Check) -> dict[str, Any]:
    lengths, file_of = found.lengths, found.file_of
    return plain(
        {
            "passed": found.passed,
            "records": found.records,
            "unusable": found.unusable,
            "context": found.limit,
            "lengths": {name: _figures(values) for name, values in lengths.items()},
            "files": [
                vars(file)
                | {"lengths": {name: _figures(values[file_of == number]) for name, values in lengths.items()}}
                for number, file in enumerate(found.files)
            ],
            "troubles": [vars(trouble) | {"advice": trouble.advice} for trouble in found.troubles],
        }
    )


def _figures(values: np.ndarray) -> dict[str, float] | None:
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


# ---------------------------------------------------------------- the terminal


def show(found: Check, written: Sequence[Path], console: Console) -> None:
    console.print(_file_table(found))
    for line in _column_lines(found):
        console.print(Text(line), soft_wrap=True)
    if len(found.file_of):
        console.print()
        console.print(_length_table(found))
        console.print()
        for line in _histogram_lines(*_main_lengths(found)):
            console.print(Text(line))
    for trouble in found.troubles:
        console.print()
        for line in _trouble_lines(trouble):
            console.print(Text(line), soft_wrap=True)
    console.print()
    console.print(Text(f"written: {', '.join(map(str, written))}"), soft_wrap=True)
    console.print(Text(summary(found)), soft_wrap=True)


def summary(found: Check) -> str:
    files = f"{len(found.files)} file{'s' if len(found.files) > 1 else ''}"
    remarks = [f"{trouble.count:,} {trouble.kind}" for trouble in found.troubles if not trouble.unusable]
    worth = f"; worth a look: {', '.join(remarks)}" if remarks else ""
    if found.passed:
        return f"all {found.records:,} records of {files} can be used{worth}"
    faults = ", ".join(f"{trouble.count:,} {trouble.kind}" for trouble in found.troubles if trouble.unusable)
    return f"NOT PASSED: {found.unusable:,} of {found.records + found.unusable:,} records of {files} cannot be used ({faults}){worth}"


def _file_table(found: Check) -> Table:
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), show_edge=False)
    table.add_column("file", overflow="fold")
    table.add_column("read as", no_wrap=True)
    for name in ("usable", "chats", "unusable"):
        table.add_column(name, justify="right", no_wrap=True)
    for file in found.files[:MOST_FILES]:
        table.add_row(Text(str(file.path)), file.read_as, f"{file.records:,}", f"{file.chats:,}", f"{file.unusable:,}")
    if len(found.files) > MOST_FILES:
        table.add_row(f"and {len(found.files) - MOST_FILES} more (in {FIGURES})", "", "", "", "")
    if len(found.files) > 1:
        table.add_row(
            "all", "", f"{found.records:,}", f"{sum(file.chats for file in found.files):,}", f"{found.unusable:,}"
        )
    return table


def _column_lines(found: Check) -> list[str]:
    """One line for each choice of columns, and the files it was made for."""
    chosen = Counter(file.columns for file in found.files if file.columns)
    lines = []
    for columns, count in chosen.items():
        first = next(file.path for file in found.files if file.columns == columns)
        whose = "" if len(chosen) == 1 else f" ({first}{f' and {count - 1} more' if count > 1 else ''})"
        lines.append(f"columns: {columns}{whose}")
    return lines


def _length_table(found: Check) -> Table:
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), show_edge=False)
    table.add_column("lengths", no_wrap=True)
    for name in ("records", "median", "95 %", "largest", "sum"):
        table.add_column(name, justify="right", no_wrap=True)
    for name, values in found.lengths.items():
        if figures := _figures(values):
            table.add_row(name, *(f"{value:,.0f}" for value in figures.values()))
    return table


def _main_lengths(found: Check) -> tuple[str, np.ndarray]:
    """What one wants to see first: of the response, in tokens where they were counted; of problems the prompt."""
    unit = "characters" if found.limit is None else "tokens"
    for name in (f"response, {unit}", f"prompt, {unit}"):
        values = found.lengths[name]
        if (values >= 0).any():
            break
    return name, values[values >= 0]


def _histogram_lines(name: str, values: np.ndarray) -> list[str]:
    edges = _edges(values, bins=12)
    counts, _ = np.histogram(values, edges)
    width = len(f"{edges[-1] - 1:,}")
    lines = [f"{name}, records"]
    for low, high, count in zip(edges[:-1], edges[1:], counts, strict=True):
        mark = "█" * round(BAR_WIDTH * count / counts.max()) or ("▏" if count else "")
        lines.append(f"  {low:>{width},} - {high - 1:<{width},} {mark} {count:,}")
    return lines


def _trouble_lines(trouble: Trouble) -> list[str]:
    lines = [f"{'unusable' if trouble.unusable else 'remark'}: {trouble.count:,} {trouble.kind}: {trouble.advice}"]
    for where, message in trouble.first:
        # A template's message names its place already where a file could not be read; a control character must not
        # reach the terminal.
        told = message if message.startswith(where) or where in message else f"{where}: {message}" if message else where
        lines.append("  " + "".join(c if c.isprintable() else " " for c in told))
    if trouble.count > len(trouble.first):
        lines.append(f"  and {trouble.count - len(trouble.first):,} more")
    return lines


def _edges(values: np.ndarray, bins: int) -> np.ndarray:
    """Whole numbers around all values (int64, at least two), about `bins` bins of the same ratio.

    No bin is narrower than the one before it: widths of 1 and 2 in turn, as rounding gives them, would make teeth of a
    smooth curve.
    """
    low, high = int(values.min()), int(values.max()) + 1
    ratio = (high / max(1, low)) ** (1 / bins)
    edges, width = [low], 1
    while edges[-1] < high:
        width = max(width, round(edges[-1] * (ratio - 1)))
        edges.append(min(high, edges[-1] + width))
    return np.array(edges)


# ---------------------------------------------------------------- the picture


def picture(found: Check) -> bytes:
    """PNG: a histogram for each length, on a logarithmic axis, with median, 95th percentile and the model's context."""
    import matplotlib  # a third of a second, and not needed for --help
    from matplotlib.figure import Figure

    unit = "characters" if found.limit is None else "tokens"
    panels = {name: values[values >= 0] for name, values in found.lengths.items() if name.endswith(unit)}
    panels = {name: values for name, values in panels.items() if len(values)}
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(1 + 3.8 * len(panels), 3.4), layout="constrained")
        for axes, (name, values) in zip(np.atleast_1d(figure.subplots(1, len(panels))), panels.items()):
            _panel(axes, name, values, found.limit if name.startswith("sample") else None)
        names = [str(file.path) for file in found.files]
        title = names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"
        figure.suptitle(
            f"{title[-100:]}: {len(found.file_of):,} records",
            x=0.01,
            ha="left",
            fontsize=9,
            color=MUTED,
            parse_math=False,
        )
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", metadata={"Software": None})
        return buffer.getvalue()


def _panel(axes: Any, name: str, values: np.ndarray, limit: int | None) -> None:
    from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter, StrMethodFormatter

    what, unit = name.split(", ")
    axes.hist(values, _edges(values, bins=40) - 0.5, color=FILL, edgecolor="white", linewidth=0.4)
    median, high = np.percentile(values, [50, 95])
    axes.axvline(median, color=MEDIAN, lw=1.5, label=f"median {median:,.0f}")
    axes.axvline(high, color=HIGH, lw=1.5, ls="--", label=f"95 % {high:,.0f}")
    if limit is not None:
        axes.axvline(limit, color=LIMIT, lw=1.5, ls=":", label=f"context {limit:,}")
    if values.max() >= 10 * values.min():
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if values.max() < 1000 * values.min() else (1,)))
        axes.xaxis.set_minor_formatter(NullFormatter())
    else:
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    axes.set_title({"prompt": "Prompt", "response": "Response", "sample": "Whole sample"}[what])
    axes.set_xlabel(f"length ({unit})")
    axes.set_ylabel("records")
    axes.margins(y=0.25)  # room for the legend
    axes.legend(loc="upper left", fontsize=8, handlelength=1.6)
