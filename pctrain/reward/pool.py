"""A pool of verifier processes with hard deadlines: a hang or a crash costs one verdict, never the run."""

from __future__ import annotations

import json
import logging
import selectors
import sys
import time
from collections import deque
from collections.abc import Sequence
from typing import TYPE_CHECKING, NoReturn

from pctrain.common import plugins
from pctrain.common.errors import UserError
from pctrain.config.verifiers import check_verifier
from pctrain.distributed.health import watchdog
from pctrain.reward.process import START_DEADLINE, Task, VerifierProcess
from pctrain.reward.verdict import Cause, Verdict
from pctrain.reward.verifiers import find

if TYPE_CHECKING:
    from pctrain.config.tree import RewardConfig

logger = logging.getLogger(__name__)

WORKER = (sys.executable, "-m", "pctrain.reward.worker")
# Seconds. The process of an async function cancels it at its deadline, and is killed only if it does not answer by
# then.
GRACE = 1.0
DEATHS = 2  # processes that may die over one sample before the pool gives up on it


class VerifierPool:
    """A context manager that scores responses against gold answers. Leaving it ends every worker.

    Verdicts that need only strings and numbers are settled in this process, in microseconds. Workers start with the
    first answer that needs Math-Verify, so a run on plain integers never pays for them. A user's function runs only in
    workers. The first of these starts at once, so that a wrong name is a UserError before anything else begins.
    `command` starts one worker that speaks the protocol of `pctrain.reward.worker`.
    """

    def __init__(self, config: RewardConfig, *, command: Sequence[str] = WORKER):
        check_verifier(config)
        self._config = config
        self._users = plugins.is_own(config.verifier)
        self._verifier = None if self._users else find(config)
        options = {
            "function": config.verifier if self._users else None,
            "timeout": config.timeout,
            "memory_mb": config.memory_mb,
        }
        self._command = (*command, json.dumps(options))
        self._workers: list[VerifierProcess] = []
        if self._users:
            self._workers.append(VerifierProcess(self._command))
            try:
                while not self._workers[0].in_flight:
                    self._exchange({})
            except BaseException:
                self.close()
                raise

    def __enter__(self) -> VerifierPool:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """End every worker and wait for it."""
        for worker in self._workers:
            worker.kill()
        self._workers.clear()

    def score(self, pairs: Sequence[tuple[str, ...]]) -> list[Verdict]:
        """Return one verdict per (response, gold answer), in order.

        A user's function may get (response, gold answer, prompt).

        Each different question is asked once per call. The call takes at most `timeout` seconds per different question
        divided by the number of workers, plus one start per kill. A sample over which a process died is asked once
        more.

        Raises:
            UserError: the user's function cannot be imported.
            RuntimeError: a worker does not start.
        """
        settled = [self._settle(pair) for pair in pairs]
        questions = list(dict.fromkeys(answer for answer in settled if not isinstance(answer, Verdict)))
        verdicts = self._ask(questions)
        return [answer if isinstance(answer, Verdict) else verdicts[answer] for answer in settled]

    def _settle(self, pair: tuple[str, ...]) -> Verdict | tuple[str, ...]:
        """Return the verdict if this process can settle it, otherwise the question for a worker."""
        if self._verifier is None:
            return tuple(pair)
        response, answer = pair
        return self._verifier.settle(response, answer)

    def _ask(self, questions: list[tuple[str, ...]]) -> dict[tuple[str, ...], Verdict]:
        """Give the questions to the workers until each has its verdict.

        An error or interrupt ends the workers, so that none keeps working on a question that nobody waits for.
        """
        verdicts: dict[tuple[str, ...], Verdict] = {}
        self._waiting = deque(Task(question) for question in questions)
        try:
            for worker in [w for w in self._workers if w.process.poll() is not None]:
                self._restart(worker, "it had ended between two calls")
            while len(self._workers) < min(self._config.workers, len(questions)):
                self._workers.append(VerifierProcess(self._command))
            while self._waiting or any(worker.open for worker in self._workers):
                for worker in self._workers:
                    while self._waiting and worker.takes(self._waiting[0]):
                        grace = GRACE if worker.in_flight > 1 else 0
                        worker.ask(self._waiting.popleft(), self._config.timeout + grace)
                self._exchange(verdicts)
        except BaseException:
            self.close()
            raise
        return verdicts

    def _exchange(self, verdicts: dict[tuple[str, ...], Verdict]) -> None:
        """Wait for the next message, death or deadline of any worker, and handle everything that has happened."""
        watchdog.beat()
        with (
            selectors.PollSelector() as selector
        ):  # poll: select() fails from file number 1024, and an engine opens many
            for worker in self._workers:
                selector.register(worker.stdout, selectors.EVENT_READ, worker)
                if worker.unsent:
                    selector.register(worker.stdin, selectors.EVENT_WRITE, worker)
            deadline = min(worker.deadline for worker in self._workers)
            ready = selector.select(None if deadline == float("inf") else max(0.0, deadline - time.monotonic()))
        for key, events in ready:
            worker = key.data
            if events & selectors.EVENT_WRITE:
                worker.write()
            elif worker in self._workers:
                self._receive(worker, verdicts)
        for worker in list(self._workers):
            if time.monotonic() >= worker.deadline:
                self._lose(worker, "timeout", f"no verdict within {self._config.timeout:g} s", verdicts)

    def _receive(self, worker: VerifierProcess, verdicts: dict[tuple[str, ...], Verdict]) -> None:
        messages = worker.read()
        if messages is None:
            status = worker.process.wait()
            self._lose(worker, "crash", f"the worker died (exit status {status})", verdicts)
            return
        for message in messages:
            if "error" in message:
                raise UserError(f"reward.verifier = {self._config.verifier!r}: {message['error']}")
            if "ready" in message:
                worker.in_flight = message["ready"]
                continue
            task = worker.open.pop(message["id"])
            detail = f"{message['detail']}; {task}" if message["detail"] else ""
            verdicts[task.question] = Verdict(message["reward"], message["cause"], detail)
            if message["cause"] == "memory":  # memory that it does not give back would be charged to other questions
                self._waiting.extendleft(reversed(worker.open.values()))
                self._restart(worker, detail)
                return

    def _lose(self, worker: VerifierProcess, cause: Cause, why: str, verdicts: dict[tuple[str, ...], Verdict]) -> None:
        """Replace a worker that died or is late.

        If it had one open question, that question is to blame. If it had several, each is asked again by itself.
        """
        if not worker.in_flight:
            self._raise_start(worker, cause)
        tasks = list(worker.open.values())
        for task in tasks:
            task.deaths += cause == "crash"
            final = len(tasks) == 1 if cause == "timeout" else task.deaths >= DEATHS
            if final:
                verdicts[task.question] = Verdict(0.0, cause, f"{why}; {task}")
            else:
                task.alone = True
                self._waiting.appendleft(task)
        self._restart(worker, f"{why} at {'; '.join(map(str, tasks[:3])) or 'no question'}")

    def _restart(self, worker: VerifierProcess, why: str) -> None:
        printed = worker.kill().strip()
        logger.warning("verifier worker restarted: %s%s", why, f"; it had printed: {printed[-300:]}" if printed else "")
        self._workers[self._workers.index(worker)] = VerifierProcess(self._command)

    def _raise_start(self, worker: VerifierProcess, cause: Cause) -> NoReturn:
        printed = worker.kill()
        if cause == "timeout":
            reason = f"did not answer for {START_DEADLINE:.0f} s"
        else:
            reason = f"ended with status {worker.process.returncode}"
        if self._users:
            raise UserError(
                f"reward.verifier = {self._config.verifier!r}: the worker that imports it {reason}:\n{printed}"
            )
        raise RuntimeError(f"verifier worker {' '.join(self._command)} {reason} while starting:\n{printed}")
