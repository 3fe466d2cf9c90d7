"""Verifier processes under a hard deadline: a hang or a crash costs one verdict, never the run."""

from __future__ import annotations

import json
import logging
import os
import selectors
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pctrain.reward.boxed import last_boxed
from pctrain.reward.verify import Cause, normalise, settle

if TYPE_CHECKING:  # a worker imports this package; it has no use for pydantic
    from pctrain.config import RewardConfig

logger = logging.getLogger(__name__)

WORKER = (sys.executable, "-m", "pctrain.reward.worker")
START_DEADLINE = 120.0  # seconds; importing Math-Verify takes half a second on an idle machine


@dataclass(frozen=True)
class Verdict:
    """`reward` is 1.0 where `cause` is "right", else 0.0.

    cause: right; wrong; no_box (no balanced box); parse_error (Math-Verify could not read or compare it); timeout; crash.
    """

    reward: float
    cause: Cause


class VerifierPool:
    """Scores responses against gold answers. A context manager: leaving it ends every worker.

    Strings and integers are settled here, in microseconds; workers start with the first answer that needs Math-Verify, so a run on plain
    integers never pays for them. `command` starts one worker that speaks the protocol of `pctrain.reward.worker`.
    """

    def __init__(self, config: RewardConfig, *, command: Sequence[str] = WORKER):
        self._timeout = config.timeout
        self._size = config.workers
        self._command = tuple(command)
        self._workers: list[_Worker] = []

    def __enter__(self) -> VerifierPool:
        return self

    def __exit__(self, *error) -> None:
        self.close()

    def close(self) -> None:
        """Ends every worker and waits for it."""
        for worker in self._workers:
            worker.kill()
        self._workers.clear()

    def score(self, pairs: Sequence[tuple[str, str]]) -> list[Verdict]:
        """One verdict per (response text, gold answer), in order.

        Takes at most `timeout` seconds per different (boxed answer, gold answer) divided by the workers, and a start per kill.
        """
        causes: list[Cause | None] = []
        questions: dict[tuple[str, str], list[int]] = {}  # the same question of a group of rollouts is asked once
        for index, (response, gold) in enumerate(pairs):
            answer = last_boxed(response)
            gold = _gold_content(gold)
            causes.append("no_box" if answer is None else settle(answer, gold))
            if causes[-1] is None:
                questions.setdefault((normalise(answer), normalise(gold)), []).append(index)
        for question, cause in self._ask(list(questions)).items():
            for index in questions[question]:
                causes[index] = cause
        return [Verdict(float(cause == "right"), cause) for cause in causes]

    def _ask(self, questions: list[tuple[str, str]]) -> dict[tuple[str, str], Cause]:
        """Hands out one question at a time to each worker; whoever passes its deadline is killed and replaced."""
        causes: dict[tuple[str, str], Cause] = {}
        waiting = list(reversed(questions))
        while len(self._workers) < min(self._size, len(questions)):
            self._workers.append(_Worker(self._command))
        idle = list(self._workers)
        with selectors.DefaultSelector() as busy:
            while waiting or busy.get_map():
                while waiting and idle:
                    worker = idle.pop()
                    if worker.died_idle():
                        worker = self._replace(worker, "crash")
                    worker.ask(waiting.pop(), self._timeout)
                    busy.register(worker.stdout, selectors.EVENT_READ, worker)
                deadline = min(key.data.deadline for key in busy.get_map().values())
                ready = {key.data for key, _ in busy.select(max(0.0, deadline - time.monotonic()))}
                for worker in [key.data for key in busy.get_map().values()]:
                    late = time.monotonic() >= worker.deadline
                    if worker not in ready and not late:
                        continue
                    busy.unregister(worker.stdout)
                    cause = worker.answer() if worker in ready else "timeout"
                    causes[worker.question] = cause
                    idle.append(self._replace(worker, cause) if cause in ("timeout", "crash") else worker)
        return causes

    def _replace(self, worker: _Worker, cause: Cause) -> _Worker:
        worker.kill()
        logger.warning("verifier worker: %s at or after answer %.200r, gold %.200r (exit status %s); restarted",
                       cause, *worker.question, worker.process.returncode)
        fresh = _Worker(self._command)
        self._workers[self._workers.index(worker)] = fresh
        return fresh


class _Worker:
    """One verifier process with at most one open question."""

    def __init__(self, command: Sequence[str]):
        # The child finds this very package, however the parent found it.
        root = str(Path(__file__).resolve().parents[2])
        path = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
        self._stderr = tempfile.TemporaryFile()
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._stderr,
                                        env={**os.environ, "PYTHONPATH": path})
        self.stdout = self.process.stdout
        self.question: tuple[str, str] = ("", "")
        self.deadline = 0.0
        self._started = False  # "ready" is awaited with the first question, so that several workers start at once

    def ask(self, question: tuple[str, str], timeout: float) -> None:
        """Sends (answer, gold); the reply is due `timeout` seconds from now."""
        if not self._started:
            self._await_start()
        self.question = question
        line = json.dumps({"answer": question[0], "gold": question[1]}) + "\n"
        try:
            self.process.stdin.write(line.encode())
            self.process.stdin.flush()
        except BrokenPipeError:  # it died just now; stdout is at its end too, which answer() reads as a crash
            pass
        self.deadline = time.monotonic() + timeout

    def died_idle(self) -> bool:
        return self._started and self.process.poll() is not None

    def answer(self) -> Cause:
        line = self.stdout.readline()
        return json.loads(line)["cause"] if line.endswith(b"\n") else "crash"

    def kill(self) -> None:
        """Kills and reaps the process; closes the pipes."""
        self.process.kill()
        self.process.wait()
        for stream in (self.process.stdin, self.stdout, self._stderr):
            try:
                stream.close()
            except BrokenPipeError:  # an unsent question was still in the buffer
                pass

    def _await_start(self) -> None:
        with selectors.DefaultSelector() as selector:
            selector.register(self.stdout, selectors.EVENT_READ)
            silent = not selector.select(START_DEADLINE)
        if silent or not self.stdout.readline():
            self.process.kill()
            self.process.wait()
            self._stderr.seek(0)
            tail = self._stderr.read().decode(errors="replace")[-2000:]
            reason = f"said nothing for {START_DEADLINE:.0f} s" if silent else f"ended with status {self.process.returncode}"
            raise RuntimeError(f"verifier worker {' '.join(self.process.args)} {reason} while starting:\n{tail}")
        self._started = True


def _gold_content(gold: str) -> str:
    r"""A gold answer may be written bare or as `\boxed{...}`."""
    boxed = last_boxed(gold)
    return gold if boxed is None else boxed
