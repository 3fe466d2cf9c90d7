"""The results file of a GPU check: one JSON object per line, appended and synced, so that a kill loses nothing.

A line of kind `run` has the machine, driver, versions and date, one of kind `point` a measurement, and one of kind
`phase` the verdict of a phase.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Row = dict[str, Any]

PASS, FAIL, SKIP, INFO = "pass", "FAIL", "SKIP", "info"
FILE = "results.jsonl"


@dataclass(frozen=True)
class Journal:
    """A writer of one run's lines."""

    path: Path
    run: str  # when the run began, which identifies it

    def append(self, kind: str, **values: Any) -> None:
        """Append one line and wait until it is on the disk."""
        row = {"kind": kind, "run": self.run, "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"), **values}
        file = os.open(self.path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            size = os.fstat(file).st_size
            torn = size and os.pread(file, 1, size - 1) != b"\n"  # a kill cut the last line
            os.write(file, b"\n" * bool(torn) + json.dumps(row).encode() + b"\n")
            os.fsync(file)
        finally:
            os.close(file)

    def points(self, phase: str) -> list[Row]:
        """Return the points of a phase of this run."""
        rows = read(self.path) if self.path.exists() else []
        return [row for row in rows if row["kind"] == "point" and (row["run"], row["phase"]) == (self.run, phase)]


def read(path: Path) -> list[Row]:
    """Return the lines of a results file; a line that a kill cut short is left out."""
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict) and {"kind", "run"} <= row.keys():
            rows.append(row)
    return rows


@dataclass(frozen=True)
class Result:
    """A phase's verdict with its points and the run's machine."""

    phase: str
    verdict: Row
    points: list[Row]
    about: Row


def newest(rows: Iterable[Row]) -> list[Result]:
    """Return the newest result of every phase: later runs into the same file replace earlier ones, phase by phase.

    A skipped phase does not replace one that ran.
    """
    abouts: dict[str, Row] = {}
    points: dict[tuple[str, str], list[Row]] = {}
    results: dict[str, Result] = {}
    for row in rows:
        if row["kind"] == "run":
            abouts[row["run"]] = row
        elif row["kind"] == "point":
            points.setdefault((row["run"], row["phase"]), []).append(row)
        elif row["kind"] == "phase":
            name, run = row["phase"], row["run"]
            if row["status"] != SKIP or name not in results:
                results[name] = Result(name, row, points.get((run, name), []), abouts.get(run, {}))
    return [*results.values()]
