"""The parent's end of one verifier process: it sends questions and receives verdicts without ever blocking."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

START_DEADLINE = 120.0  # seconds; importing Math-Verify takes half a second on an idle machine


@dataclass(eq=False)
class Task:
    """A question, and how often a process died over it.

    The question is the response or the boxed answer, then the gold answer, and for a judge also the prompt.
    """

    question: tuple[str, ...]
    deaths: int = 0
    alone: bool = False  # a process with several open questions died or hung, so each is asked again by itself
    deadline: float = 0.0

    def __str__(self) -> str:
        return f"answer {self.question[0][-120:]!r}, gold {self.question[1][:120]!r}"


class VerifierProcess:
    """One process of `pctrain.reward.worker`.

    It has its own session, so whatever a user's function starts is killed with it.
    """

    def __init__(self, command: Sequence[str]):
        # The child must import this same package, however the parent found it.
        root = str(Path(__file__).resolve().parents[2])
        path = os.pathsep.join(filter(None, [os.environ.get("PYTHONPATH"), root]))
        self._stderr = tempfile.TemporaryFile()  # noqa: SIM115 - it is read when the process is killed
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._stderr,
            bufsize=0,
            env={**os.environ, "PYTHONPATH": path},
            start_new_session=True,
        )
        self.stdin, self.stdout = _pipe(self.process.stdin), _pipe(self.process.stdout)
        os.set_blocking(self.stdin.fileno(), False)
        os.set_blocking(self.stdout.fileno(), False)
        self.open: dict[int, Task] = {}
        self.in_flight = 0  # the number of questions that it takes at once; 0 until it is ready
        self.unsent = b""
        self._unread = b""
        self._asked = 0
        self._start_deadline = time.monotonic() + START_DEADLINE

    @property
    def deadline(self) -> float:
        """The time to act, on the monotonic clock; infinite while the process is idle."""
        if not self.in_flight:
            return self._start_deadline
        return min((task.deadline for task in self.open.values()), default=float("inf"))

    def takes(self, task: Task) -> bool:
        """Return whether the process can take this task now."""
        if task.alone or any(other.alone for other in self.open.values()):
            return self.in_flight > 0 and not self.open
        return len(self.open) < self.in_flight

    def ask(self, task: Task, timeout: float) -> None:
        """Send a question. The verdict is due `timeout` seconds from now."""
        self._asked += 1
        self.open[self._asked] = task
        task.deadline = time.monotonic() + timeout
        named = zip(("response", "answer", "prompt"), task.question, strict=False)  # only a judge has a prompt
        self.unsent += json.dumps({"id": self._asked, **dict(named)}).encode() + b"\n"
        self.write()

    def write(self) -> None:
        """Send as much as the pipe takes now. A process that does not read must not block its parent."""
        try:
            while self.unsent:
                sent = self.stdin.write(self.unsent)
                if sent is None:  # the pipe is full
                    return
                self.unsent = self.unsent[sent:]
        except BrokenPipeError:  # the process has just died; its stdout is at its end too
            self.unsent = b""

    def read(self) -> list[dict[str, Any]] | None:
        """Return the messages that have arrived, or None if the process has ended."""
        chunk = self.stdout.read(1 << 20)
        if chunk == b"":
            return None
        *lines, self._unread = (self._unread + (chunk or b"")).split(b"\n")
        return [json.loads(line) for line in lines]

    def kill(self) -> str:
        """Kill and reap the process and what it started, and close the pipes. Return the end of its stderr."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        if self._stderr.closed:
            return ""
        self._stderr.seek(0, os.SEEK_END)
        self._stderr.seek(max(0, self._stderr.tell() - 2000))
        tail = self._stderr.read().decode(errors="replace")
        for stream in (self.stdin, self.stdout, self._stderr):
            stream.close()
        return tail


def _pipe(stream: IO[bytes] | None) -> IO[bytes]:
    if stream is None:
        raise RuntimeError("the verifier process was started without a pipe")
    return stream
