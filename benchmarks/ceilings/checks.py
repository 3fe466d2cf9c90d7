"""One line of the benchmark: what was measured, its target, and whether it is met."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table


@dataclass(frozen=True)
class Check:
    name: str
    value: float
    low: float | None = None  # target: at least this
    high: float | None = None  # target: at most this
    form: str = ".2f"
    beside: str = ""  # what the number means little without: interval widths, paired wins

    @property
    def passed(self) -> bool | None:
        """None: there is no target, or nothing was there to measure."""
        if (self.low is None and self.high is None) or np.isnan(self.value):
            return None
        return (self.low is None or self.value >= self.low) and (self.high is None or self.value <= self.high)

    @property
    def target(self) -> str:
        if self.low is not None and self.high is not None:
            return f"{self.low:{self.form}} - {self.high:{self.form}}"
        if self.low is not None:
            return f">= {self.low:{self.form}}"
        return "" if self.high is None else f"<= {self.high:{self.form}}"


def share(values: Sequence[bool] | np.ndarray) -> float:
    """Mean of booleans; NaN of none."""
    return float(np.mean(values)) if len(values) else float("nan")


def width(intervals: Sequence[float]) -> str:
    return f"median width {np.median(intervals):.1f}" if len(intervals) else ""


def show(title: str, checks: Sequence[Check], console: Console) -> None:
    table = Table(title=title, box=box.MARKDOWN, title_justify="left")
    for name in ("check", "value", "target", "", "beside"):
        table.add_column(name, no_wrap=name != "beside")
    for check in checks:
        value = "-" if np.isnan(check.value) else f"{check.value:{check.form}}"
        table.add_row(
            check.name, value, check.target, {None: "", True: "met", False: "MISSED"}[check.passed], check.beside
        )
    console.print(table)
    console.print()
