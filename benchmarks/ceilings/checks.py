"""A row of the benchmark: a measured value, its target, and whether the target is met."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table


@dataclass(frozen=True)
class Check:
    """A measured value and its target."""

    name: str
    value: float
    low: float | None = None  # target: at least this
    high: float | None = None  # target: at most this
    form: str = ".2f"
    note: str = ""  # numbers that belong to the value: interval widths, paired wins

    @property
    def passed(self) -> bool | None:
        """True if the target is met; None if there is no target or no value."""
        if (self.low is None and self.high is None) or np.isnan(self.value):
            return None
        return (self.low is None or self.value >= self.low) and (self.high is None or self.value <= self.high)

    @property
    def target(self) -> str:
        """The target as text."""
        if self.low is not None and self.high is not None:
            return f"{self.low:{self.form}} - {self.high:{self.form}}"
        if self.low is not None:
            return f">= {self.low:{self.form}}"
        return "" if self.high is None else f"<= {self.high:{self.form}}"


def share(values: Sequence[bool] | np.ndarray) -> float:
    """Return the mean of booleans; NaN if there are none."""
    return float(np.mean(values)) if len(values) else float("nan")


def width(intervals: Sequence[float] | np.ndarray) -> str:
    """Return the median width of intervals as a note."""
    return f"median width {np.median(intervals):.1f}" if len(intervals) else ""


def show(title: str, checks: Sequence[Check], console: Console) -> None:
    """Print the checks as a Markdown table."""
    table = Table(title=title, box=box.MARKDOWN, title_justify="left")
    for name in ("check", "value", "target", "", "note"):
        table.add_column(name, no_wrap=name != "note")
    for check in checks:
        value = "-" if np.isnan(check.value) else f"{check.value:{check.form}}"
        table.add_row(
            check.name, value, check.target, {None: "", True: "met", False: "MISSED"}[check.passed], check.note
        )
    console.print(table)
    console.print()
