"""The output of a benchmark run: a JSON file, one row per point and line, and pictures of time and memory."""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import platform
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import torch
from harness import FLOOR, Row

PACKAGES = ("triton", "liger-kernel", "cut-cross-entropy", "quack-kernels", "verl")
SHAPES_A_PICTURE = 12


def about(device: torch.device) -> Row:
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = None
    driver = None
    if device.type == "cuda":
        command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        driver = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[0]
        versions["cuda"] = torch.version.cuda
    name = torch.cuda.get_device_name() if device.type == "cuda" else f"{_cpu_name()}, one thread"
    return {"machine": name, "driver": driver, "versions": versions, "date": datetime.date.today().isoformat()}


def _cpu_name() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if sys.platform == "linux" else []
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())


def file_stem(about: Row) -> str:
    return re.sub(r"[^a-z0-9]+", "-", f"{about['machine']}-{about['date']}".lower())


def write_json(rows: Sequence[Row], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("[\n" + ",\n".join(json.dumps(row) for row in rows) + "\n]\n")


def line(row: Row) -> str:
    """One row for the terminal. What is wrong or absent has no time."""
    head = f"{row['op']:<24} {row['tokens']:>6} {row['vocab']:>7} {row['width']:>5}  {row['provider']:<28}"
    if row["status"] != "ok":
        return f"{head} {row['status']}: {row['reason'].splitlines()[0][:120]}"
    spread = f"{row['quantiles_ms']['25']:.2f} - {row['quantiles_ms']['75']:.2f}"
    return (f"{head} {row['median_ms']:>10.2f} ms  ({spread}; {row['turns']} turns)  {row['of_floor']:>6.2f} x floor  "
            f"{row['peak_bytes'] / 2**20:>9.1f} MiB, {(row['peak_bytes'] - row['result_bytes']) / 2**20:.1f} beyond results")  # fmt: skip


def pictures(rows: Sequence[Row], stem: Path) -> list[Path]:
    """Bars of time over the floor's and of peak memory: an operation a line of panels, at most `SHAPES_A_PICTURE` shapes a file."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    shapes = list(dict.fromkeys((row["width"], row["vocab"], row["tokens"]) for row in rows))
    paths = []
    for first in range(0, len(shapes), SHAPES_A_PICTURE):
        chosen = shapes[first : first + SHAPES_A_PICTURE]
        mine = [row for row in rows if (row["width"], row["vocab"], row["tokens"]) in chosen]
        ops = list(dict.fromkeys(row["op"] for row in mine))
        size = (min(26, 14 + len(chosen)), 0.8 + 3.6 * len(ops))
        figure, axes = pyplot.subplots(len(ops), 2, figsize=size, squeeze=False, layout="constrained")
        for (left, right), op in zip(axes, ops, strict=True):
            of_op = [row for row in mine if row["op"] == op]
            floor = of_op[0]["floor_is"]
            of_op = [row for row in of_op if row["provider"] != FLOOR]
            _bars(left, of_op, lambda row: row["of_floor"], "{:.2f}")
            left.axhline(1, color="black", linewidth=0.8)
            left.set(title=f"{op}: time over the floor\n({floor})", ylabel="median / floor")
            _bars(right, of_op, lambda row: row["peak_bytes"] / 2**20, "{:.0f}")
            right.set(title=f"{op}: peak memory beyond the inputs", ylabel="MiB")
            if right.patches:  # else nothing but the floor has a time
                right.set_yscale("log")
                right.legend(fontsize=7, loc="upper left", bbox_to_anchor=(1.01, 1))
        about = mine[0]
        versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items() if version)
        figure.suptitle(f"{about['machine']}, {about['dtype']}, {about['date']}; {versions}", fontsize=10)
        number = "" if len(shapes) <= SHAPES_A_PICTURE else f"-{first // SHAPES_A_PICTURE + 1}"
        path = stem.with_name(f"{stem.name}{number}.png")
        figure.savefig(path, dpi=100)
        pyplot.close(figure)
        paths.append(path)
    return paths


def _bars(axis, rows: Sequence[Row], value, label: str) -> None:
    """A group of bars a shape, a bar a provider; what has no time leaves its name and status instead."""
    shapes = list(dict.fromkeys((row["tokens"], row["vocab"], row["width"]) for row in rows))
    providers = list(dict.fromkeys(row["provider"] for row in rows))
    timed = [name for name in providers if any(row["provider"] == name and row["status"] == "ok" for row in rows)]
    statuses = {
        name: Counter(row["status"] for row in rows if row["provider"] == name and row["status"] != "ok")
        for name in providers
    }
    missing = [f"{name} {status} at {count}" for name, counts in statuses.items() for status, count in counts.items()]
    width = 0.85 / max(1, len(timed))
    for i, name in enumerate(timed):
        points = {
            (r["tokens"], r["vocab"], r["width"]): value(r)
            for r in rows
            if r["provider"] == name and r["status"] == "ok"
        }
        at = [(shapes.index(shape) + (i - (len(timed) - 1) / 2) * width, height) for shape, height in points.items()]
        bars = axis.bar(*zip(*at, strict=True), width, label=name)
        axis.bar_label(
            bars, [label.format(height) for _, height in at], fontsize=6, rotation=90 if len(at) > 3 else 0, padding=1
        )
    axis.margins(y=0.15)
    axis.set_xticks(range(len(shapes)), [f"T {t}\nV {v}\nH {h}" for t, v, h in shapes], fontsize=7)
    axis.tick_params(axis="y", labelsize=7)
    axis.title.set_fontsize(9)
    if missing:
        axis.set_xlabel(f"no time (of {len(shapes)} shapes): " + "; ".join(missing), fontsize=7, wrap=True)
