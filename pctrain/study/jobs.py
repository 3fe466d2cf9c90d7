"""Which stage a job does next: several jobs (processes, nodes) that run the same study coordinate in its folder.

A job that runs a stage holds the stage's lock. The lock is released when the job ends, however it ends. The next job
finds it free and resumes the stage.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from pctrain.distributed.health import watchdog
from pctrain.files.lock import holder, try_lock
from pctrain.study.stages import Stage, State

LOCKS = ".study"
POLL = 2.0  # seconds between two looks at what other jobs hold
REMIND = 600.0  # seconds between two messages about who is waited for


def lock_file(root: Path, name: str) -> Path:
    """Return the lock of a stage, or of the report."""
    return root / LOCKS / (name.replace("/", "~") + ".lock")


@dataclass
class Claim:
    """A stage that this job holds."""

    stage: Stage
    release: Callable[[], None]


class Crew:
    """One job's view of the plan, on rank 0 only; the other ranks get its decisions.

    Args:
        root: folder of the study.
        stages: all stages.
        mine: the stages that this job runs.
        ended: returns whether a stage is "done", "left out" (its start did not occur) or "to do".
        print_line: prints a line.
    """

    def __init__(
        self,
        root: Path,
        stages: Sequence[Stage],
        mine: Sequence[Stage],
        ended: Callable[[Stage], State],
        print_line: Callable[[str], None] = print,
    ):
        self.root = root
        self.stages = list(stages)
        self.mine = list(mine)
        self.ended = ended
        self.print_line = print_line
        self.claim: Claim | None = None
        self._reminded_at = 0.0

    def state(self, stage: Stage) -> tuple[State, str]:
        """Return the state of a stage, and who runs it if somebody does."""
        ended = self.ended(stage)
        if ended != "to do" or (self.claim and self.claim.stage == stage):
            return ended, ""
        file = lock_file(self.root, stage.name)
        if not file.exists():
            return "to do", ""
        if (release := try_lock(file)) is not None:
            release()
            return "to do", ""
        return "running", holder(file)

    def take(self) -> Iterator[None]:
        """Claim the next free stage whose needs are done. While others run what it needs, wait and yield now and then.

        Afterwards `claim` is the stage, or None if nothing is left for this job.
        """
        self.claim = None
        while (claim := self._next()) is None and self._worth_waiting() and not watchdog.asked_to_stop():
            yield
            time.sleep(POLL)
        self.claim = claim or self._next()  # what was waited for may have ended between the two looks

    def done(self) -> None:
        """Release the claimed stage, which has ended or failed."""
        if self.claim is not None:
            self.claim.release()
            self.claim = None

    @property
    def all_ended(self) -> bool:
        """Return whether no stage is left to do, by any job."""
        return all(self.ended(stage) != "to do" for stage in self.stages)

    def _next(self) -> Claim | None:
        by_name = {stage.name: stage for stage in self.stages}
        for stage in self.mine:
            if self.ended(stage) != "to do" or any(self.ended(by_name[name]) == "to do" for name in stage.needs):
                continue
            file = lock_file(self.root, stage.name)
            file.parent.mkdir(parents=True, exist_ok=True)
            release = try_lock(file)
            if release is None:
                continue
            if self.ended(stage) == "to do":  # another job may have ended it just before
                return Claim(stage, release)
            release()
        return None

    def _worth_waiting(self) -> bool:
        """Return whether a stage of this job waits for one that another job runs."""
        blocked = {name for stage in self.mine if self.ended(stage) == "to do" for name in stage.needs}
        states = {stage.name: self.state(stage) for stage in self.stages if stage.name in blocked}
        running = [(name, runner) for name, (state, runner) in states.items() if state == "running"]
        now = time.monotonic()
        if running and (not self._reminded_at or now - self._reminded_at > REMIND):
            self._reminded_at = now
            self.print_line("waiting for " + ", ".join(f"{name} ({runner})" for name, runner in running))
        return bool(running)
