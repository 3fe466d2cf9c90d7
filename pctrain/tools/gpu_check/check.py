"""Give a phase its mode, its folders, and the functions that record points."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from pctrain.tools.gpu_check.results import FAIL, INFO, PASS, SKIP, Journal

MODULE = "pctrain.tools.gpu_check.child"  # of every process


class SkipPhase(Exception):
    """Raised by a phase that cannot run on this machine; its text is the reason."""


@dataclass
class Check:
    """One phase's view of the run."""

    phase: str
    results: str  # the results file
    run: str
    out: str  # where files for the user go
    scratch: str  # for files that are deleted at the end
    gpu: bool
    quick: bool
    seconds: float  # the phase's limit
    _since: float = field(default_factory=time.perf_counter, repr=False)

    @property
    def journal(self) -> Journal:
        """The writer of the run's results file."""
        return Journal(Path(self.results), self.run)

    @property
    def folder(self) -> Path:
        """An own folder for files that are deleted at the end."""
        folder = Path(self.scratch) / self.phase
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def measure(
        self,
        point: str,
        value: float,
        unit: str = "",
        *,
        at_most: float | None = None,
        at_least: float | None = None,
        note: str = "",
    ) -> None:
        """Record a figure; without a bound it is only reported. NaN fails every bound."""
        bounds = {"at most": at_most, "at least": at_least}
        limits = [f"{words} {bound:.4g}" for words, bound in bounds.items() if bound is not None]
        inside = (at_most is None or value <= at_most) and (at_least is None or value >= at_least)
        status = INFO if not limits else PASS if inside else FAIL
        self._record(point, status, value=value, unit=unit, limit=", ".join(limits), note=note)

    def expect(self, point: str, passed: bool, note: str = "") -> None:
        """Record whether something holds."""
        self._record(point, PASS if passed else FAIL, note=note)

    def skip(self, point: str, reason: str) -> None:
        """Record that a point cannot be measured here."""
        self._record(point, SKIP, note=reason)

    def inform(self, point: str, note: str) -> None:
        """Record a fact that is not judged."""
        self._record(point, INFO, note=note)

    def _record(self, point: str, status: str, **values: Any) -> None:
        now = time.perf_counter()
        kept = {name: value for name, value in values.items() if value != ""}
        self.journal.append(
            "point", phase=self.phase, point=point, status=status, **kept, seconds=round(now - self._since, 3)
        )
        self._since = now
        shown = " ".join(str(value) for value in kept.values())
        print(f"{status}: {point}: {shown}", flush=True)

    def program(self, function: str, *, dies: bool = False, **arguments: Any) -> Any:
        """Call `function` ("name" of the phase's module) in a new process; return its result, which is JSON.

        With `dies` the process is killed by SIGKILL right after it has handed its result over.
        """
        path = self.folder / f"{function}.json"
        path.unlink(missing_ok=True)
        asked = {"function": function, "arguments": arguments, "result": str(path), "dies": dies}
        command = [sys.executable, "-u", "-m", MODULE, json.dumps({"check": self.to_json(), **asked})]
        done = subprocess.run(command)
        expected = -9 if dies else 0
        if done.returncode != expected or not path.exists():
            raise RuntimeError(
                f"{self.phase}: the process of {function} ended with status {done.returncode}, expected {expected}; "
                "its output is above"
            )
        return json.loads(path.read_text())

    def to_json(self) -> dict[str, Any]:
        """Return the fields for another process."""
        return {name: value for name, value in asdict(self).items() if not name.startswith("_")}


def hand_over(path: str, result: Any) -> None:
    """Write a program's result so that it is complete or absent."""
    temporary = f"{path}.{os.getpid()}"
    Path(temporary).write_text(json.dumps(result))
    os.replace(temporary, path)
