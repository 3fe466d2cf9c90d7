"""The files of a run: JSON with a self-contained row per line, and pictures of time and of memory."""

from __future__ import annotations

import contextlib
import datetime
import importlib.metadata
import json
import platform
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from harness import FLOORS, Row

PACKAGES = ("triton", "liger-kernel", "cut-cross-entropy", "quack-kernels", "verl")
SHAPES_PER_PICTURE = 12

# tokens, vocabulary entries, hidden size
Point = tuple[int, int, int]


def about(device: torch.device) -> Row:
    """Return the machine, driver, versions and date of a run."""
    versions: dict[str, str | None] = {"python": platform.python_version(), "torch": torch.__version__}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = None
    driver = None
    if device.type == "cuda":
        command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        with contextlib.suppress(OSError, subprocess.CalledProcessError):  # some containers have no nvidia-smi
            driver = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[0]
        versions["cuda"] = torch.version.cuda
    name = torch.cuda.get_device_name() if device.type == "cuda" else f"{_cpu_name()}, one thread"
    return {"machine": name, "driver": driver, "versions": versions, "date": datetime.date.today().isoformat()}


def _cpu_name() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if sys.platform == "linux" else []
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())


def file_stem(about: Row) -> str:
    """Return the name of a run's files without their ending."""
    return re.sub(r"[^a-z0-9]+", "-", f"{about['machine']}-{about['date']}".lower())


def write_json(rows: Sequence[Row], path: Path) -> None:
    """Write the rows, one per line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("[\n" + ",\n".join(json.dumps(row) for row in rows) + "\n]\n")


def line(row: Row) -> str:
    """Return a row as a line for the terminal; a row whose status is not ok has no time."""
    head = f"{row['op']:<24} {row['tokens']:>6} {row['vocab']:>7} {row['width']:>5}  {row['provider']:<28}"
    if row["status"] != "ok":
        return f"{head} {row['status']}: {row['reason'].splitlines()[0][:120]}"
    spread = f"{row['quantiles_ms']['25']:.2f} - {row['quantiles_ms']['75']:.2f}"
    time = f"{row['median_ms']:>10.2f} ms  ({spread}; {row['turns']} turns)  {row['of_floor']:>6.2f} x floor"
    if "of_fp32_floor" in row:
        time += f", {row['of_fp32_floor']:.2f} x fp32 floor"
    if "ms_by_bytes" in row:
        time += f" ({row['ms_by_bytes']:.2f} ms by its bytes)"
    beyond = (row["peak_bytes"] - row["result_bytes"]) / 2**20
    return f"{head} {time}  {row['peak_bytes'] / 2**20:>9.1f} MiB, {beyond:.1f} beyond results"


def pictures(rows: Sequence[Row], stem: Path) -> list[Path]:
    """Draw bars of time over the floor's and of peak memory, and return the files.

    An operation takes a line of panels, and a file shows at most `SHAPES_PER_PICTURE` shapes.
    """
    points = list(dict.fromkeys(_point(row) for row in rows))
    paths = []
    for first in range(0, len(points), SHAPES_PER_PICTURE):
        chosen = points[first : first + SHAPES_PER_PICTURE]
        number = "" if len(points) <= SHAPES_PER_PICTURE else f"-{first // SHAPES_PER_PICTURE + 1}"
        path = stem.with_name(f"{stem.name}{number}.png")
        _draw([row for row in rows if _point(row) in chosen], path)
        paths.append(path)
    return paths


def _point(row: Row) -> Point:
    return row["tokens"], row["vocab"], row["width"]


def _draw(rows: Sequence[Row], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    ops = list(dict.fromkeys(row["op"] for row in rows))
    size = (min(26, 14 + len({_point(row) for row in rows})), 0.8 + 3.6 * len(ops))
    figure, axes = pyplot.subplots(len(ops), 2, figsize=size, squeeze=False, layout="constrained")
    for (left, right), op in zip(axes, ops, strict=True):
        of_op = [row for row in rows if row["op"] == op]
        floor = of_op[0]["floor_is"]
        of_op = [row for row in of_op if row["provider"] not in FLOORS]
        _bars(left, of_op, lambda row: row["of_floor"], "{:.2f}")
        left.axhline(1, color="black", linewidth=0.8)
        left.set(title=f"{op}: time over the floor\n({floor})", ylabel="median / floor")
        _bars(right, of_op, lambda row: row["peak_bytes"] / 2**20, "{:.0f}")
        right.set(title=f"{op}: peak memory beyond the inputs", ylabel="MiB")
        if right.patches:  # otherwise only the floor has a time
            right.set_yscale("log")
            right.legend(fontsize=7, loc="upper left", bbox_to_anchor=(1.01, 1))
    about = rows[0]
    versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items() if version)
    figure.suptitle(f"{about['machine']}, {about['dtype']}, {about['date']}; {versions}", fontsize=10)
    figure.savefig(path, dpi=100)
    pyplot.close(figure)


def _bars(axis: Any, rows: Sequence[Row], value: Callable[[Row], float], label: str) -> None:
    """Draw a group of bars per shape, a bar per provider; name the providers without a time below."""
    points = list(dict.fromkeys(_point(row) for row in rows))
    heights = _heights(rows, value)
    width = 0.85 / max(1, len(heights))
    for i, (name, by_point) in enumerate(heights.items()):
        offset = (i - (len(heights) - 1) / 2) * width
        positions = [points.index(point) + offset for point in by_point]
        bars = axis.bar(positions, list(by_point.values()), width, label=name)
        labels = [label.format(height) for height in by_point.values()]
        axis.bar_label(bars, labels, fontsize=6, rotation=90 if len(labels) > 3 else 0, padding=1)
    axis.margins(y=0.15)
    axis.set_xticks(range(len(points)), [f"T {t}\nV {v}\nH {h}" for t, v, h in points], fontsize=7)
    axis.tick_params(axis="y", labelsize=7)
    axis.title.set_fontsize(9)
    missing = _missing(rows)
    if missing:
        axis.set_xlabel(f"no time (of {len(points)} shapes): " + "; ".join(missing), fontsize=7, wrap=True)


def _heights(rows: Sequence[Row], value: Callable[[Row], float]) -> dict[str, dict[Point, float]]:
    """Return {provider: {point: value}} of the rows with a time."""
    heights: dict[str, dict[Point, float]] = {}
    for row in rows:
        if row["status"] == "ok":
            heights.setdefault(row["provider"], {})[_point(row)] = value(row)
    return heights


def _missing(rows: Sequence[Row]) -> list[str]:
    """Return provider, status and number of points for the rows without a time."""
    counts = Counter((row["provider"], row["status"]) for row in rows if row["status"] != "ok")
    return [f"{name} {status} at {count}" for (name, status), count in counts.items()]
