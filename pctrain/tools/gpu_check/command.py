"""The command line of the GPU check, and its loop over the phases."""

from __future__ import annotations

import argparse
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

from pctrain.common.errors import UserError
from pctrain.tools.gpu_check import tables
from pctrain.tools.gpu_check.about import about
from pctrain.tools.gpu_check.phase_table import (
    CPU_PATIENCE,
    GROUPS,
    NAMES,
    TOTAL_SECONDS,
    Phase,
    choose,
)
from pctrain.tools.gpu_check.results import FAIL, FILE, SKIP, Journal, Result, newest, read
from pctrain.tools.gpu_check.runner import LOG, Runner, Verdict

PASSED, FAILED, BAD_INPUT = 0, 1, 2

DESCRIPTION = """Check a GPU machine in at most ten minutes, without a network.

Every phase runs in its own process with a time limit. Every measured point is appended to OUT/results.jsonl at once.
The exit status is 0 if nothing failed, 1 if a phase failed, and 2 for bad arguments. A phase whose packages are not
installed is skipped, and says which."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse the command line, and run the phases or show results; return the exit status."""
    parser = argparse.ArgumentParser(
        "gpu_check", description=DESCRIPTION, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument(
        "--phases", metavar="A,B", help=f"phases: {', '.join(NAMES)}\nor groups: {', '.join(GROUPS)}; default: all"
    )
    parser.add_argument("--out", type=Path, default=Path("gpu-check"), metavar="DIR", help="default: ./gpu-check")
    parser.add_argument("--quick", action="store_true", help="fewer and smaller points")
    parser.add_argument("--cpu", action="store_true", help="run without a GPU, on small sizes: shows that it starts")
    parser.add_argument(
        "--seconds", type=float, metavar="S", help=f"time of the whole run; default {TOTAL_SECONDS:.0f} on a GPU"
    )
    parser.add_argument(
        "--compare",
        nargs="+",
        type=Path,
        metavar="RESULTS",
        help="run nothing: print the README's table and docs/gpu.md's from a results file;\n"
        "with a second file, also both files' figures next to each other",
    )
    options = parser.parse_args(arguments)
    try:
        if options.compare is not None:
            return compare(options.compare)
        phases = choose(options.phases)
        return run(phases, options.out, cpu=options.cpu, quick=options.quick, seconds=options.seconds)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return BAD_INPUT


def run(phases: Sequence[Phase], out: Path, *, cpu: bool, quick: bool = False, seconds: float | None = None) -> int:
    """Run the phases, print their table, and return the exit status."""
    if seconds is None:
        seconds = TOTAL_SECONDS * (CPU_PATIENCE if cpu else 1)
    if not seconds > 0:
        raise UserError(f"--seconds {seconds:g}: expected more than 0, the time of the whole run")
    out = out.resolve()
    journal = Journal(out / FILE, time.strftime("%Y-%m-%dT%H:%M:%S"))
    facts = about(cpu)
    try:
        out.mkdir(parents=True, exist_ok=True)
        journal.append("run", **facts, quick=quick, phases=[phase.name for phase in phases])
    except OSError as error:
        reason = f"{out} cannot be written ({error.strerror})"
        raise UserError(f"{reason}. Expected a folder for the results: name another one") from None
    print(f"{facts['machine']}{', in CPU mode' if cpu else ''}; results in {out}", flush=True)
    scratch = Path(tempfile.mkdtemp(prefix="gpu-check-"))
    runner = Runner(journal, out, scratch, cpu, quick)
    verdicts: list[Verdict] = []
    began = time.monotonic()
    previous = signal.signal(signal.SIGTERM, _interrupt)  # a phase is killed with this process
    interrupted = False
    try:
        for phase in phases:
            verdicts.append(runner.run(phase, seconds - (time.monotonic() - began)))
            print(_line(verdicts[-1]), flush=True)
    except KeyboardInterrupt:
        interrupted = True
    finally:
        signal.signal(signal.SIGTERM, previous)
        shutil.rmtree(scratch, ignore_errors=True)
    print()
    print(tables.terminal(verdicts, {verdict.phase: journal.points(verdict.phase) for verdict in verdicts}))
    return _status(verdicts, interrupted, time.monotonic() - began, out)


def _status(verdicts: Sequence[Verdict], interrupted: bool, seconds: float, out: Path) -> int:
    failed = [verdict.phase for verdict in verdicts if verdict.status == FAIL]
    skipped = sum(verdict.status == SKIP for verdict in verdicts)
    passed = len(verdicts) - len(failed) - skipped
    counts = f"{passed} passed, {len(failed)} failed, {skipped} skipped"
    print(f"\n{counts} in {seconds:.0f} s; all output is in {out / LOG}")
    if interrupted:
        print("interrupted: the other phases did not run")
    return FAILED if failed or interrupted else PASSED


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def _line(verdict: Verdict) -> str:
    reason = (verdict.reason.splitlines() or [""])[0]
    return f"{verdict.status} {verdict.phase} ({verdict.seconds:.1f} s){': ' if reason else ''}{reason}"


def compare(files: Sequence[Path]) -> int:
    """Print the tables of one results file, or of two; return the exit status."""
    if len(files) > 2:
        raise UserError(f"--compare: got {len(files)} files. Expected RESULTS and at most one BASELINE")
    contents = [_results(file) for file in files]
    print(tables.markdown(contents[0]))
    if len(contents) == 2:
        print()
        print(tables.side_by_side(*contents))
    return PASSED


def _results(file: Path) -> list[Result]:
    try:
        results = newest(read(file))
        fault = "" if results else "has no finished phase"
    except OSError as error:
        fault = f"cannot be read ({error.strerror})"
    except UnicodeDecodeError:
        fault = "cannot be read (it is not text)"
    if fault:
        raise UserError(
            f"--compare: {file} {fault}. Expected the {FILE} of a run of this check: name that file, or run the check"
        )
    return results
