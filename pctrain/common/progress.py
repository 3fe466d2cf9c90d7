"""One progress bar for all long work (SFT steps, RL steps, evaluation, fits), with the rate and the time left.

    with progress("SFT", total=1440, start=600, unit="step", rank=rank) as bar:
        for step in ...:
            bar.advance(loss=update.loss)

On a terminal it is a rich bar; an inner `progress` is drawn below the outer one and disappears when it ends. Elsewhere
(CI logs, files) it is one plain line about every ten seconds and one at the end. Ranks other than 0 are silent.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TaskID, TextColumn
from rich.text import Text

from pctrain.common.errors import ToBeContinued

PLAIN_SECONDS = 10.0
Item = TypeVar("Item")


def make_console() -> Console:
    """Return the console for tables and summaries. A log has no width, and rich's default of 80 is too little."""
    return Console(highlight=False, width=None if sys.stdout.isatty() else 120)


class Bar:
    """The state of one piece of work. `advance` is cheap enough for every item."""

    def __init__(self, description: str, total: int, unit: str, start: int) -> None:
        self.description = description
        self.total = total
        self.unit = unit
        self.start = start
        self.done = start
        self.values: dict[str, Any] = {}
        self._began = time.monotonic()

    def advance(self, count: int = 1, **values: Any) -> None:
        """Count units as done. `values` are shown next to the bar from now on, numbers with four digits."""
        self.done += count
        self.values.update(values)
        self._show()

    def resize(self, total: int) -> None:
        """Set the total once it is known."""
        self.total = total

    def _show(self) -> None:
        """Do nothing: this class is the bar of ranks other than 0."""

    def _close(self, end: str | None = None) -> None:
        """End the bar. `end` says why the work stopped early; None if it did not."""

    def pace(self) -> str:
        """Return `2.1 steps/s, 0:05:12 left`. Units done before this start do not count towards the rate."""
        elapsed, done = time.monotonic() - self._began, self.done - self.start
        if done <= 0 or elapsed <= 0:
            return ""
        rate = done / elapsed
        speed = f"{rate:.3g} {_plural(self.unit)}/s" if rate >= 0.5 else f"{1 / rate:.3g} s/{self.unit}"
        left = (self.total - self.done) / rate
        return f"{speed}, {_clock(left)} left" if left > 0 else f"{speed}, {_clock(elapsed)} total"

    def shown_values(self) -> str:
        """Return the values next to the bar."""
        return " ".join(
            f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}" for key, value in self.values.items()
        )


class _PlainBar(Bar):
    """A line every ten seconds. An inner bar that ends before its first line is due stays silent: logs stay short."""

    _open = 0  # number of open plain bars; the outermost one always prints its last line

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._outermost = _PlainBar._open == 0
        _PlainBar._open += 1
        self._printed_at = time.monotonic()
        self._printed_done: int | None = None

    def _show(self) -> None:
        if time.monotonic() - self._printed_at >= PLAIN_SECONDS:
            self._print()

    def _close(self, end: str | None = None) -> None:
        _PlainBar._open -= 1
        if end is not None:
            self._print(f" ({end})")
        elif self._printed_done != self.done and (self._outermost or self._printed_done is not None):
            self._print()

    def _print(self, end: str = "") -> None:
        share = 100 * self.done / self.total if self.total else 100
        parts = [
            f"{self.description}: {self.done}/{self.total} {_plural(self.unit)} ({share:.0f}%)",
            self.pace(),
            self.shown_values(),
        ]
        print("  ".join(part for part in parts if part) + end, flush=True)
        self._printed_at = time.monotonic()
        self._printed_done = self.done


class _RichBar(Bar):
    """A task of the live display. rich draws only one display at a time, so inner bars join that of the outer one."""

    _live: Progress | None = None

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._outermost = _RichBar._live is None
        self._display = _RichBar._live or _display()
        if self._outermost:
            _RichBar._live = self._display
            self._display.start()
        self._task: TaskID = self._display.add_task(self.description, total=self.total, completed=self.done, bar=self)

    def resize(self, total: int) -> None:
        super().resize(total)
        self._display.update(self._task, total=total)

    def _show(self) -> None:
        self._display.update(self._task, completed=self.done)

    def _close(self, end: str | None = None) -> None:
        if self._outermost:
            _RichBar._live = None
            self._display.stop()
        else:
            self._display.remove_task(self._task)


class _PaceColumn(ProgressColumn):
    def render(self, task: Task) -> Text:
        return Text(task.fields["bar"].pace(), style="progress.remaining")


class _ValuesColumn(ProgressColumn):
    def render(self, task: Task) -> Text:
        return Text(task.fields["bar"].shown_values(), style="dim")


def _display() -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=30),
        TextColumn("{task.completed}/{task.total}"),
        _PaceColumn(),
        _ValuesColumn(),
        console=make_console(),
        refresh_per_second=4,
    )


@contextmanager
def progress(description: str, total: int, *, unit: str = "step", start: int = 0, rank: int = 0) -> Iterator[Bar]:
    """Open a bar over `total` units, of which `start` were done before (a resumed run). Bars can be nested."""
    visible = _RichBar if sys.stdout.isatty() else _PlainBar
    bar = (visible if rank == 0 else Bar)(description, total, unit, start)
    try:
        yield bar
    except GeneratorExit:  # a `track` that was left early
        bar._close()
        raise
    except (ToBeContinued, KeyboardInterrupt):
        bar._close("interrupted")
        raise
    except BaseException:
        bar._close("stopped by an error")
        raise
    bar._close()


def track(items: Iterable[Item], description: str, total: int, *, unit: str = "item", rank: int = 0) -> Iterator[Item]:
    """Iterate over `items` under a bar."""
    with progress(description, total, unit=unit, rank=rank) as bar:
        for item in items:
            yield item
            bar.advance()


def _plural(unit: str) -> str:
    return unit if unit.isupper() else f"{unit}s"


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{seconds:02}"
