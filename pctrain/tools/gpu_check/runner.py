"""Run phases, each in a process group with a limit, and record their verdicts."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from pctrain.tools.gpu_check.check import MODULE, Check
from pctrain.tools.gpu_check.child import SKIPPED
from pctrain.tools.gpu_check.phase_table import CPU_PATIENCE, Phase
from pctrain.tools.gpu_check.results import FAIL, PASS, SKIP, Journal

LOG = "gpu_check.log"
TAIL_LINES = 15
POLL_SECONDS = 0.05
AFTER_KILL_SECONDS = 10.0  # a process that the driver holds may not end at all
ROOT = Path(__file__).resolve().parents[3]


@dataclass(frozen=True)
class Verdict:
    """The outcome of one phase."""

    phase: str
    status: str
    seconds: float
    reason: str = ""


@dataclass(frozen=True)
class Ended:
    """How a phase's process ended: `returncode` as subprocess counts it; None if it had to be killed."""

    returncode: int | None
    still_there: bool = False


@dataclass(frozen=True)
class Runner:
    """One run of several phases."""

    journal: Journal
    out: Path
    scratch: Path
    cpu: bool
    quick: bool

    def run(self, phase: Phase, seconds_left: float) -> Verdict:
        """Run a phase, at most until the run's time is over; append its verdict and return it."""
        began = time.monotonic()
        verdict = self._run(phase, seconds_left)
        verdict = Verdict(phase.name, verdict.status, round(time.monotonic() - began, 1), verdict.reason)
        self.journal.append(
            "phase", phase=phase.name, status=verdict.status, seconds=verdict.seconds, reason=verdict.reason
        )
        return verdict

    def _run(self, phase: Phase, seconds_left: float) -> Verdict:
        missing = phase.missing(self.cpu)
        if missing is not None:
            return Verdict(phase.name, SKIP, 0, missing)
        if seconds_left <= 0:
            reason = f"the run's time was over; run it alone: --phases {phase.name}"
            return Verdict(phase.name, SKIP, 0, reason)
        limit = min(phase.seconds * (CPU_PATIENCE if self.cpu else 1), seconds_left)
        log = self.out / LOG
        with open(log, "ab") as stream:
            stream.write(f"\n==== {phase.name}\n".encode())
            stream.flush()
            start = stream.tell()
            ended = self._process(phase, limit, stream)
        return self._judge(phase, ended, limit, _tail(log, start))

    def _process(self, phase: Phase, limit: float, stream: BinaryIO) -> Ended:
        """Start the phase's process, wait for it, and leave nothing of its process group behind."""
        check = Check(
            phase=phase.name,
            results=str(self.journal.path),
            run=self.journal.run,
            out=str(self.out),
            scratch=str(self.scratch),
            gpu=not self.cpu,
            quick=self.quick,
            seconds=limit,
        )
        process = subprocess.Popen(
            [sys.executable, "-u", "-m", MODULE, json.dumps({"check": check.to_json()})],
            stdin=subprocess.DEVNULL,
            stdout=stream,
            stderr=subprocess.STDOUT,
            env=self._environment(phase),
            start_new_session=True,
        )
        over = False
        try:
            over = _ends_within(process.pid, limit)
        finally:
            # The leader is not reaped yet, so the number of its group cannot belong to another.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
        try:
            returncode = process.wait(AFTER_KILL_SECONDS)
        except subprocess.TimeoutExpired:
            return Ended(None, still_there=True)
        return Ended(returncode if over else None)

    def _environment(self, phase: Phase) -> dict[str, str]:
        path = os.pathsep.join([str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)
        environment = {**os.environ, "PYTHONPATH": path}
        if self.cpu:
            environment |= {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", **phase.cpu_environment}
        return environment

    def _judge(self, phase: Phase, ended: Ended, limit: float, tail: str) -> Verdict:
        points = self.journal.points(phase.name)
        failed = [row["point"] for row in points if row["status"] == FAIL]
        lines = tail.splitlines()
        last = f": {lines[-1]}" if lines else ""
        if len(lines) > 1:
            last += f"\n{tail}"
        if ended.still_there:
            reason = f"took longer than {limit:.0f} s and did not end after SIGKILL{last}"
        elif ended.returncode is None:
            done = f" after {len(points)} points" if points else ""
            reason = f"took longer than {limit:.0f} s and was killed{done}{last}"
        elif ended.returncode < 0:
            reason = f"died by {_signal_name(-ended.returncode)}{last}"
        elif ended.returncode not in (0, SKIPPED):
            reason = f"ended with status {ended.returncode}{last}"
        elif failed:
            reason = f"{len(failed)} of {len(points)} points failed: {', '.join(failed[:3])}" + (
                ", ..." if len(failed) > 3 else ""
            )
        elif ended.returncode == SKIPPED:
            return Verdict(phase.name, SKIP, 0, points[-1]["note"])
        elif not any(row["status"] == PASS for row in points):
            reason = f"checked nothing: none of its {len(points)} points has a bound"
        else:
            return Verdict(phase.name, PASS, 0)
        return Verdict(phase.name, FAIL, 0, reason)


def _ends_within(pid: int, seconds: float) -> bool:
    """Wait until the child has ended, without reaping it; return False after `seconds`."""
    deadline = time.monotonic() + seconds
    while True:
        if os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None:
            return True
        if time.monotonic() > deadline:
            return False
        time.sleep(POLL_SECONDS)


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def _tail(log: Path, start: int) -> str:
    """Return the last lines that were written to the log from `start` on."""
    with open(log, "rb") as stream:
        stream.seek(start)
        lines = stream.read().decode(errors="replace").splitlines()
    return "\n".join(line[:300] for line in lines[-TAIL_LINES:])
