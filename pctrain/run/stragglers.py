"""The slowest rank of each phase: at every step all ranks report how long they worked, without their waits for others.

`RUN/ranks.json` has the means of this start. When one rank keeps holding up the others, train.log and the terminal get
a line.
"""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from typing import Any

import numpy as np

from pctrain.distributed import parallel, waits
from pctrain.distributed.health import phases, watchdog
from pctrain.run import documents
from pctrain.run.folder import RunFolder

PHASES = ("data", "swap", "rollout", "reward", "update", "validation", "evaluation", "checkpoint")
# A window has so many steps, and lasts a minute or longer. A rank is reported after lagging in two consecutive windows:
# on a machine with other work every rank is slow for a while.
WINDOW, WINDOW_SECONDS = 20, 60.0
LAG = 0.2  # a rank lags if its median exceeds the median of the others by this share
OF_STEP = 0.05  # and by this share of a step; less is not worth fixing
WRITE_SECONDS = 10.0


@dataclass(frozen=True)
class Laggard:
    """A rank that lags in a phase, with its own seconds per step and the others'."""

    phase: int
    rank: int
    seconds: float
    others: float


class RankTimes:
    """Seconds of own work of every rank by phase, over the steps of this start except the first, which warms up.

    Every rank holds one; rank 0 alone keeps the numbers and writes them.

    steps: number of steps counted. sums: float64 [world, phases].
    """

    def __init__(self, run: RunFolder) -> None:
        """Start to measure. Collective."""
        self.run, self.steps = run, 0
        self.places: list[dict[str, Any]] = parallel.gather({"host": os.uname().nodename, **parallel.coordinates()})
        self.sums = np.zeros((len(self.places), len(PHASES)))
        self._window: list[np.ndarray] = []
        self._step_seconds: list[float] = []
        self._lagging: set[tuple[int, int]] = set()  # (phase, rank) that lagged in the last window
        self._reported: set[tuple[int, int]] = set()
        self._warm = False
        self._step_ended = time.monotonic()
        self._written = self._step_ended
        phases.take()

    def end_step(self, step: int) -> bool:
        """End a step: exchange the ranks' times, and return whether a rank was asked to stop (SIGTERM, SIGUSR1).

        Collective; one exchange serves both purposes. If a rank was asked to stop, the run saves this step and leaves.
        """
        waits.settle()
        own = phases.take()
        rows = parallel.gather_row([float(watchdog.asked_to_stop()), *(own.get(phase, 0.0) for phase in PHASES)])
        now = time.monotonic()
        if self._warm and len(rows) > 1 and self.run.writes:
            self._add(step, rows[:, 1:], now - self._step_ended)
        self._warm, self._step_ended = True, now
        return bool(rows[:, 0].any())

    def _add(self, step: int, own: np.ndarray, seconds: float) -> None:
        """Add the own seconds [world, phases] of a step that lasted `seconds`; report laggards at a window's end."""
        self.steps += 1
        self.sums += own
        self._window.append(own)
        self._step_seconds.append(seconds)
        if len(self._window) >= WINDOW and sum(self._step_seconds) >= WINDOW_SECONDS:
            steps = len(self._window)
            for laggard in self._laggards():
                self.run.say(
                    f"step {step} rank {laggard.rank} ({_place(self.places[laggard.rank])}) holds up the others in "
                    f"phase {PHASES[laggard.phase]}: {laggard.seconds:.3g} s of work per step, the others "
                    f"{laggard.others:.3g} s (medians of the last {steps} steps)"
                )
            self._window, self._step_seconds = [], []
        if time.monotonic() - self._written > WRITE_SECONDS:
            self.write()

    def _laggards(self) -> list[Laggard]:
        """Return the ranks that lag in this window and the one before. Each is reported once, until it catches up."""
        window, step = np.stack(self._window), float(np.median(self._step_seconds))  # [steps, world, phases]
        before = self._lagging
        lagging = set()
        laggards = []
        for phase in range(len(PHASES)):
            times = window[:, :, phase]
            rank = int(times.mean(0).argmax())
            others = np.median(np.delete(times, rank, 1), 1)
            if np.median(times[:, rank] - others) <= max(LAG * np.median(others), OF_STEP * step):
                continue
            lagging.add((phase, rank))
            if (phase, rank) in before - self._reported:
                laggards.append(Laggard(phase, rank, float(np.median(times[:, rank])), float(np.median(others))))
        self._lagging = lagging
        self._reported = (self._reported & lagging) | {(laggard.phase, laggard.rank) for laggard in laggards}
        return laggards

    def slowest(self) -> list[dict[str, Any]]:
        """Return, for each phase that took time, its slowest rank, its own seconds per step, and the others' median."""
        means = self.sums / max(1, self.steps)
        rows = []
        for phase, times in zip(PHASES, means.T, strict=True):
            if len(times) > 1 and times.any():
                rank = int(times.argmax())
                rows.append(
                    {
                        "phase": phase,
                        "rank": rank,
                        "place": _place(self.places[rank]),
                        "seconds": float(times[rank]),
                        "others": float(np.median(np.delete(times, rank))),
                    }
                )
        return rows

    def write(self) -> None:
        """Write ranks.json, on rank 0 of several and after the first counted step."""
        if not self.steps:
            return
        self._written = time.monotonic()
        means = (self.sums / self.steps).T
        own = {phase: times.tolist() for phase, times in zip(PHASES, means, strict=True) if times.any()}
        documents.write_ranks(
            self.run.path,
            {"steps": self.steps, "ranks": self.places, "own_seconds": own, "slowest": self.slowest()},
        )

    def summary(self) -> dict[str, str]:
        """Write ranks.json and return the row of the closing summary, which is empty for one rank."""
        self.write()
        parts = [
            f"{row['phase']} rank {row['rank']}, {row['seconds']:.3g} s per step (the others {row['others']:.3g})"
            for row in self.slowest()
        ]
        return {"slowest rank": "; ".join(parts)} if parts else {}


def _place(place: dict[str, Any]) -> str:
    return ", ".join([place["host"], *(f"{name} {index}" for name, index in place.items() if name != "host")])
