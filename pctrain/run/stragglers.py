"""The slowest rank of each phase: at every step all ranks report how long they worked, without waiting for others.

`RUN/ranks.json` holds the means over this start. When one rank keeps holding up the others, train.log and the terminal
get a line.
"""

from __future__ import annotations

import json
import os
import time
from dataclasses import dataclass
from typing import Any

import numpy as np

from pctrain.distributed import parallel, waits
from pctrain.distributed.health import phases, watchdog
from pctrain.files.durable import plain, write_beside
from pctrain.run.folder import RunFolder
from pctrain.run.layout import RANKS_FILE

PHASES = ("data", "swap", "rollout", "reward", "update", "validation", "evaluation", "checkpoint")
# A window has this many steps and lasts at least a minute. A rank is reported after lagging in two consecutive windows:
# on a machine with other work, every rank is slow for a while.
WINDOW, WINDOW_SECONDS = 20, 60.0
LAG = 0.2  # in the median over a window's steps, relative to the median of the other ranks
SHARE_OF_STEP = 0.05  # a lag below this share of a step is not worth fixing
WRITE_SECONDS = 10.0


@dataclass(frozen=True)
class Laggard:
    """A rank that lags in a phase: seconds of own work per step, and the median of the others."""

    phase: int
    rank: int
    seconds: float
    others: float


class RankTimes:
    """Own seconds of every rank by phase, over the steps of this start but the first, which warms up.

    Every rank holds one; only rank 0 keeps the reports of all and writes them.

    Attributes:
        steps: number of steps in `sums`.
        places: host and position in the layout of every rank.
        sums: float64 [world, phases].
    """

    def __init__(self, run: RunFolder) -> None:
        self.run = run
        self.steps = 0
        self.places = parallel.gather({"host": os.uname().nodename, **parallel.coordinates()})
        self.sums = np.zeros((len(self.places), len(PHASES)))
        self._window: list[np.ndarray] = []
        self._step_seconds: list[float] = []
        self._lagging: set[tuple[int, int]] = set()  # (phase, rank) in the last window
        self._reported: set[tuple[int, int]] = set()
        self._warm = False
        now = time.monotonic()
        self._step_ended = now
        self._written = now
        phases.take()

    def end_step(self, step: int) -> bool:
        """Exchange the times of a step; return True if any rank was asked to stop (SIGTERM, SIGUSR1).

        Collective, and a single collective for both. After True the step is saved and the run ends.
        """
        waits.settle()
        own = phases.take()
        rows = parallel.gather_row([float(watchdog.asked_to_stop()), *(own.get(phase, 0.0) for phase in PHASES)])
        now = time.monotonic()
        if self._warm and len(rows) > 1 and self.run.writes:
            self._add(step, rows[:, 1:], now - self._step_ended)
        self._warm = True
        self._step_ended = now
        return bool(rows[:, 0].any())

    def _add(self, step: int, own: np.ndarray, seconds: float) -> None:
        self.steps += 1
        self.sums += own
        self._window.append(own)
        self._step_seconds.append(seconds)
        if len(self._window) >= WINDOW and sum(self._step_seconds) >= WINDOW_SECONDS:
            for laggard in self._laggards():
                place = _place(self.places[laggard.rank])
                self.run.say(
                    f"step {step} rank {laggard.rank} ({place}) holds up the others in phase {PHASES[laggard.phase]}: "
                    f"{laggard.seconds:.3g} s of its own work per step, "
                    f"the others {laggard.others:.3g} s (medians of the last {len(self._window)} steps)"
                )
            self._window = []
            self._step_seconds = []
        if time.monotonic() - self._written > WRITE_SECONDS:
            self.write()

    def _laggards(self) -> list[Laggard]:
        """Return the ranks that lag in this window and lagged in the one before, once until they have caught up."""
        window, step_seconds = np.stack(self._window), np.median(self._step_seconds)  # window: [steps, world, phases]
        before = self._lagging
        self._lagging = set()
        laggards = []
        for phase in range(len(PHASES)):
            times = window[:, :, phase]
            rank = int(times.mean(0).argmax())
            others = np.median(np.delete(times, rank, 1), 1)
            if np.median(times[:, rank] - others) > max(LAG * np.median(others), SHARE_OF_STEP * step_seconds):
                self._lagging.add((phase, rank))
                if (phase, rank) in before - self._reported:
                    laggards.append(Laggard(phase, rank, float(np.median(times[:, rank])), float(np.median(others))))
        still_lagging = self._reported & self._lagging
        self._reported = still_lagging | {(laggard.phase, laggard.rank) for laggard in laggards}
        return laggards

    def slowest(self) -> list[dict[str, Any]]:
        """Return the slowest rank of each phase that took time: its own seconds per step, and the others' median."""
        means = self.sums / max(1, self.steps)
        rows = []
        for phase, times in zip(PHASES, means.T, strict=True):
            if len(times) > 1 and times.any():
                rank = int(times.argmax())
                others = float(np.median(np.delete(times, rank)))
                place = _place(self.places[rank])
                seconds = float(times[rank])
                rows.append({"phase": phase, "rank": rank, "place": place, "seconds": seconds, "others": others})
        return rows

    def write(self) -> None:
        """Write ranks.json on rank 0, if there are several ranks and a step to report."""
        if not self.steps:
            return
        self._written = time.monotonic()
        means = (self.sums / self.steps).T
        own_seconds = {phase: times.tolist() for phase, times in zip(PHASES, means, strict=True) if times.any()}
        content = {"steps": self.steps, "ranks": self.places, "own_seconds": own_seconds, "slowest": self.slowest()}
        write_beside(self.run.path / RANKS_FILE, json.dumps(plain(content), indent=1) + "\n")

    def summary(self) -> dict[str, str]:
        """Write ranks.json, and return the row of the closing summary; empty for one rank."""
        self.write()
        words = [
            f"{row['phase']} rank {row['rank']}, {row['seconds']:.3g} s per step (the others {row['others']:.3g})"
            for row in self.slowest()
        ]
        return {"slowest rank": "; ".join(words)} if words else {}


def _place(place: dict[str, Any]) -> str:
    return ", ".join([place["host"], *(f"{name} {index}" for name, index in place.items() if name != "host")])
