"""Runs a target: rounds of examples, each in a forked process with a memory limit, each example under a deadline.

What is no success and no clear error is a finding: another exception, an example that takes too long, a message that
nobody can read, something half-written, and the death of the process (a signal, or memory that C code could not get).
"""

from __future__ import annotations

import contextlib
import faulthandler
import io
import itertools
import os
import re
import resource
import select
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import hypothesis
from hypothesis.strategies import SearchStrategy

from pctrain.common.errors import RunFault, UserError
from tests.fuzz.case import Case

CPU_SECONDS = 20  # of one example, in CPU time: a busy machine misses no deadline
STANDSTILL = 300  # seconds without the end of an example: the process waits for something
MEMORY = 4 << 30  # bytes of address space beyond what the target's imports mapped
LONGEST_MESSAGE = 20_000  # characters
ROUND = 400  # examples of a process
ACCEPTED, REFUSED, FOUND = b"a", b"r", b"f"  # what a round's process says of each example


class Target(Protocol):
    """A module that can be fuzzed."""

    NAME: str
    CASES: SearchStrategy[Case]

    def prepare(self, folder: Path) -> Mapping[str, Path]:
        """Imports what the examples need and makes the folders that cases are laid over: {base: folder}."""

    def run(self, case: Case, folder: Path) -> None:
        """Does what the case says with the files in `folder`, which is the current one.

        UserError and RunFault are clean ends.
        """


class TooSlow(BaseException):
    """No Exception: what catches those must not catch this."""


class Unclean(Exception):
    """The end is not as it should be, though no foreign exception was raised."""


@dataclass
class Outcome:
    """The result of a campaign. `findings`: {what and where: the file of the first case}."""

    target: str
    examples: int = 0
    accepted: int = 0
    refused: int = 0
    seconds: float = 0.0
    seeds: list[int] = field(default_factory=list)
    findings: dict[str, Path] = field(default_factory=dict)

    def line(self) -> str:
        found = f"{len(self.findings)} findings" if self.findings else "nothing found"
        seeds = f"seeds {self.seeds[0]} to {self.seeds[-1]}" if self.seeds else "no seed"
        return (
            f"fuzz {self.target}: {self.examples} examples in {self.seconds:.0f} s "
            f"({self.accepted} accepted, {self.refused} refused), "
            f"{seeds}, {found}"
        )


def campaign(
    target: Target, findings: Path, *, seed: int = 0, examples: int | None = None, minutes: float | None = None
) -> Outcome:
    """Rounds with the seeds `seed`, `seed + 1`, ... until there were `examples`, or until `minutes` are over.

    Args:
        findings: folder for the first case of each finding, as JSON, and its traceback; those of an earlier campaign
            go.
    """
    findings.mkdir(parents=True, exist_ok=True)
    for earlier in findings.glob(f"{target.NAME}-*"):
        earlier.unlink()
    outcome = Outcome(target.NAME)
    with tempfile.TemporaryDirectory(prefix=f"fuzz-{target.NAME}-") as scratch:
        bases = target.prepare(Path(scratch))
        began = time.monotonic()  # making the folders takes minutes on a busy machine, and is no fuzzing
        end = began + 60 * minutes if minutes is not None else None
        for number in itertools.count(seed):
            left = ROUND if examples is None else min(ROUND, examples - outcome.examples)
            if left <= 0 or (end is not None and time.monotonic() >= end):
                break
            outcome.seeds.append(number)
            _round(target, bases, Path(scratch), findings, number, left, end, outcome)
    outcome.seconds = time.monotonic() - began
    for path in sorted(findings.glob(f"{target.NAME}-*.json")):
        outcome.findings[path.with_suffix(".txt").read_text().splitlines()[0]] = path
    return outcome


def _round(
    target: Target,
    bases: Mapping[str, Path],
    scratch: Path,
    findings: Path,
    seed: int,
    examples: int,
    end: float | None,
    outcome: Outcome,
) -> None:
    """One process. It says of each example how it ended; where it dies, the case it was at is a finding."""
    current = scratch / "current.json"
    current.unlink(missing_ok=True)
    told, tells = os.pipe()
    child = os.fork()
    if child == 0:
        status = 1
        try:
            os.close(told)
            _child(target, bases, scratch, findings, seed, examples, end, tells)
            status = 0
        finally:
            os._exit(status)
    os.close(tells)
    stands = False
    while True:
        ready, _, _ = select.select([told], [], [], STANDSTILL)
        said = os.read(told, 1 << 16) if ready else b""
        ends = Counter(said)
        outcome.examples += len(said)
        outcome.accepted += ends[ACCEPTED[0]]
        outcome.refused += ends[REFUSED[0]]
        if not said:
            stands = not ready
            break
    os.close(told)
    if stands:
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    if stands or status:
        outcome.examples += 1
        how = f"stood still for {STANDSTILL} s" if stands else f"died: wait status {status}"
        stacks = (scratch / "stacks.txt").read_text()
        place = re.search(r'File ".*?/(pctrain/[^"]+)", line (\d+)', stacks)
        name = f"{how} at {place[1]}:{place[2]}" if place else how
        _keep(target, findings, name, Case.read(current) if current.exists() else None, stacks)


def _child(
    target: Target,
    bases: Mapping[str, Path],
    scratch: Path,
    findings: Path,
    seed: int,
    examples: int,
    end: float | None,
    tells: int,
) -> None:
    sys.stderr = (scratch / "stacks.txt").open("w")
    faulthandler.enable(sys.stderr)
    mapped = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (mapped + MEMORY, resource.getrlimit(resource.RLIMIT_AS)[1]))

    @hypothesis.seed(seed)
    @hypothesis.settings(
        max_examples=examples,
        database=None,
        derandomize=False,
        deadline=None,
        phases=[hypothesis.Phase.generate],
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    @hypothesis.given(target.CASES)
    def one(case: Case) -> None:
        if end is not None and time.monotonic() >= end:
            os._exit(0)
        case.save(scratch / "current.json")
        try:
            os.write(tells, attempt(target, bases, case, scratch))
        except (Exception, TooSlow) as error:
            name = f"{type(error).__name__} at {_place(error)}"
            _keep(target, findings, name, case, "".join(traceback.format_exception(error)))
            os.write(tells, FOUND)

    try:
        one()
    except BaseException:
        traceback.print_exc(file=sys.stderr)
        sys.stderr.flush()
        raise


def attempt(target: Target, bases: Mapping[str, Path], case: Case, scratch: Path) -> bytes:
    """ACCEPTED or REFUSED. Raises what is a finding."""
    folder, back = scratch / "case", Path.cwd()
    shutil.rmtree(folder, ignore_errors=True)
    case.lay_out(folder, bases)
    os.chdir(folder)
    signal.signal(signal.SIGPROF, _too_slow)
    signal.setitimer(signal.ITIMER_PROF, CPU_SECONDS)
    try:
        with _strict_output():
            target.run(case, folder)
        return ACCEPTED
    except (UserError, RunFault) as error:
        _check_message(str(error))
        _check_leftovers(folder, case, bases)
        return REFUSED
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        os.chdir(back)


def _too_slow(*_: object) -> None:
    raise TooSlow(f"more than {CPU_SECONDS} s of CPU time")


@contextlib.contextmanager
def _strict_output():
    """Standard output as a terminal has it: UTF-8, and what cannot be written as that is an error."""
    with io.TextIOWrapper(io.BytesIO(), "utf-8", errors="strict") as printed, contextlib.redirect_stdout(printed):
        yield


def _check_message(message: str) -> None:
    if not message.strip():
        raise Unclean("an error without a message")
    if len(message) > LONGEST_MESSAGE:
        raise Unclean(f"an error message of {len(message)} characters: {message[:300]}")


def _check_leftovers(folder: Path, case: Case, bases: Mapping[str, Path]) -> None:
    """After a refusal: no results (`out*`) and nothing half-written that was not there before."""
    before = (
        {path.relative_to(bases[case.base]).as_posix() for path in bases[case.base].rglob("*")} if case.base else set()
    )
    now = {path.relative_to(folder).as_posix() for path in folder.rglob("*")}
    left = [
        name
        for name in sorted(now - before - set(case.files))
        if name.startswith("out") or name.endswith((".tmp", ".partial"))
    ]
    if left:
        raise Unclean(f"refused, and yet this is left: {', '.join(left)}")


def _place(error: BaseException) -> str:
    """The innermost line of pctrain that it came through, and the innermost of all."""
    frames = traceback.extract_tb(error.__traceback__)
    ours = [frame for frame in frames if "/pctrain/" in frame.filename]
    names = [f"{'/'.join(frame.filename.split('/')[-3:])}:{frame.lineno}" for frame in [*ours[-1:], frames[-1]]]
    return " in ".join(dict.fromkeys(names))


def _keep(target: Target, findings: Path, name: str, case: Case | None, told: str) -> None:
    path = findings / f"{target.NAME}-{re.sub(r'[^A-Za-z0-9]+', '-', name).strip('-')[:150]}.json"
    if not path.exists():
        path.with_suffix(".txt").write_text(f"{name}\n\n{told}", errors="backslashreplace")
        (case or Case("died before the first case")).save(path)
