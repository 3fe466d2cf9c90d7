"""Which rank is the slowest at each phase: at every step all ranks tell how long they worked themselves, without waiting for others.

`RUN/ranks.json` has the means of this start, train.log and the terminal a line when one rank keeps holding up the others.
"""

from __future__ import annotations

import json
import os
import time

import numpy as np

from pctrain.distributed import parallel, waits
from pctrain.distributed.health import phases, watchdog
from pctrain.files.durable import plain, write_beside
from pctrain.run.folder import RunFolder
from pctrain.run.layout import RANKS_FILE

PHASES = ("data", "swap", "rollout", "reward", "update", "validation", "evaluation", "checkpoint")
# A window: so many steps, and no less than a minute. A rank that lags in two windows in a row is told of: on a machine with other work
# each is slow for a while.
WINDOW, WINDOW_SECONDS = 20, 60.0
LAG = 0.2  # in the median of a window's steps, beyond the median of the others
OF_STEP = 0.05  # and no less than this share of a step, or nobody would mend it
WRITE_SECONDS = 10.0


class RankTimes:
    """Own seconds of every rank by phase, over the steps of this start but the first, which warms up. Every rank holds one; rank 0 alone
    keeps what they tell, and writes.

    `steps`: how many; `sums`: float64 [world, phases].
    """

    def __init__(self, run: RunFolder):
        self.run, self.steps = run, 0
        self.places = parallel.gather({"host": os.uname().nodename, **parallel.coordinates()})
        self.sums = np.zeros((len(self.places), len(PHASES)))
        self._window: list[np.ndarray] = []
        self._step_seconds: list[float] = []
        self._lagging: set[tuple[int, int]] = set()  # (phase, rank) in the last window
        self._told: set[tuple[int, int]] = set()
        self._begun = False
        self._at = self._written = time.monotonic()
        phases.take()

    def end_step(self, step: int) -> bool:
        """Collective, at the end of a step: whether a rank was asked to stop (SIGTERM, SIGUSR1); then the step is saved and the run leaves.

        The one collective tells both.
        """
        waits.settle()
        own = phases.take()
        rows = parallel.gather_row([float(watchdog.asked_to_stop()), *(own.get(phase, 0.0) for phase in PHASES)])
        now = time.monotonic()
        if self._begun and len(rows) > 1 and self.run.writes:
            self._add(step, rows[:, 1:], now - self._at)
        self._begun, self._at = True, now
        return bool(rows[:, 0].any())

    def _add(self, step: int, own: np.ndarray, seconds: float) -> None:
        self.steps += 1
        self.sums += own
        self._window.append(own)
        self._step_seconds.append(seconds)
        if len(self._window) >= WINDOW and sum(self._step_seconds) >= WINDOW_SECONDS:
            for phase, rank, its, others in self._laggards():
                place, steps = _place(self.places[rank]), len(self._window)
                self.run.say(
                    f"step {step} rank {rank} ({place}) holds up the others in phase {PHASES[phase]}: {its:.3g} s of its own work "
                    f"a step, the others {others:.3g} s (medians of the last {steps} steps)"
                )
            self._window, self._step_seconds = [], []
        if time.monotonic() - self._written > WRITE_SECONDS:
            self.write()

    def _laggards(self) -> list[tuple[int, int, float, float]]:
        """(phase, rank, its seconds a step, the others') of those that lag in this window as in the one before: each is told of once, until
        it has caught up."""
        window, step = np.stack(self._window), np.median(self._step_seconds)  # [steps, world, phases]
        found, before = [], self._lagging
        self._lagging = set()
        for phase in range(len(PHASES)):
            times = window[:, :, phase]
            rank = int(times.mean(0).argmax())
            others = np.median(np.delete(times, rank, 1), 1)
            if np.median(times[:, rank] - others) > max(LAG * np.median(others), OF_STEP * step):
                self._lagging.add((phase, rank))
                if (phase, rank) in before - self._told:
                    found.append((phase, rank, float(np.median(times[:, rank])), float(np.median(others))))
        self._told = (self._told & self._lagging) | {(phase, rank) for phase, rank, *_ in found}
        return found

    def slowest(self) -> list[dict]:
        """Of each phase that took time: its slowest rank, seconds of own work a step, and the median of the other ranks."""
        means = self.sums / max(1, self.steps)
        found = []
        for phase, times in zip(PHASES, means.T, strict=True):
            if len(times) > 1 and times.any():
                rank = int(times.argmax())
                found.append(
                    {
                        "phase": phase,
                        "rank": rank,
                        "place": _place(self.places[rank]),
                        "seconds": float(times[rank]),
                        "others": float(np.median(np.delete(times, rank))),
                    }
                )
        return found

    def write(self) -> None:
        """Rank 0 writes ranks.json, where there are several ranks and a step to tell of."""
        if not self.steps:
            return
        self._written = time.monotonic()
        means = {
            phase: times.tolist()
            for phase, times in zip(PHASES, (self.sums / self.steps).T, strict=True)
            if times.any()
        }
        write_beside(
            self.run.path / RANKS_FILE,
            json.dumps(
                plain({"steps": self.steps, "ranks": self.places, "own_seconds": means, "slowest": self.slowest()}),
                indent=1,
            )
            + "\n",
        )

    def summary(self) -> dict[str, str]:
        """Writes, and the row of the closing summary: nothing of one rank."""
        self.write()
        words = [
            f"{row['phase']} rank {row['rank']}, {row['seconds']:.3g} s a step (the others {row['others']:.3g})"
            for row in self.slowest()
        ]
        return {"slowest rank": "; ".join(words)} if words else {}


def _place(place: dict) -> str:
    return ", ".join([place["host"], *(f"{name} {index}" for name, index in place.items() if name != "host")])
