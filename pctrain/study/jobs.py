"""Which stage a job does next: several jobs (processes, nodes) that run the same study meet in its folder.

A job that runs a stage holds the stage's lock, which dies with it, however it dies. The next job finds it free and goes on.
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
REMIND = 600.0  # seconds between two words about who is waited for


def lock_file(root: Path, name: str) -> Path:
    return root / LOCKS / (name.replace("/", "~") + ".lock")


@dataclass
class Claim:
    """A stage that this job holds."""

    stage: Stage
    release: Callable[[], None]


class Crew:
    """One job's view of the plan. On one rank alone; the others are told.

    `ended`: whether a stage of the plan is "done" or "left out" (its start did not occur), else "to do".
    """

    def __init__(
        self,
        root: Path,
        stages: Sequence[Stage],
        mine: Sequence[Stage],
        ended: Callable[[Stage], State],
        say: Callable[[str], None] = print,
    ):
        self.root, self.stages, self.mine, self.ended, self.say = root, list(stages), list(mine), ended, say
        self.claim: Claim | None = None
        self._said = 0.0

    def state(self, stage: Stage) -> tuple[State, str]:
        """(state, who runs it, where somebody does)."""
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
        """Claims the next free stage whose needs are done; where others run what is needed, waits, with a value now and then.

        Afterwards `claim` is the stage, or None: nothing is left for this job.
        """
        self.claim = None
        while (claim := self._next()) is None and self._worth_waiting() and not watchdog.asked_to_stop():
            yield
            time.sleep(POLL)
        self.claim = claim or self._next()  # what was waited for may have ended between the two looks

    def done(self) -> None:
        """The claimed stage has ended, well or not."""
        self.claim.release()
        self.claim = None

    @property
    def all_ended(self) -> bool:
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
        """Whether a stage of this job waits for one that another job runs."""
        blocked = {name for stage in self.mine if self.ended(stage) == "to do" for name in stage.needs}
        running = [
            (stage.name, who)
            for stage in self.stages
            if stage.name in blocked
            for state, who in [self.state(stage)]
            if state == "running"
        ]
        if running and time.monotonic() - self._said > (REMIND if self._said else 0.0):
            self._said = time.monotonic()
            self.say("waiting for " + ", ".join(f"{name} ({who})" for name, who in running))
        return bool(running)
