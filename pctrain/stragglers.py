"""Which rank is the slowest at each phase: at every step all ranks tell how long they worked themselves, without waiting for others.

`RUN/ranks.json` has the means of this start, train.log and the terminal a line when one rank keeps holding up the others.
"""

from __future__ import annotations

import json
import os
import time
from collections import deque

import numpy as np

from pctrain import health, phase_clock
from pctrain.ceiling.layout import RANKS_FILE
from pctrain.core import parallel, waits
from pctrain.durable import plain, write_beside
from pctrain.runfolder import RunFolder

PHASES = ("data", "swap", "rollout", "reward", "update", "validation", "evaluation", "checkpoint")
WINDOW = 20  # steps over which a rank must lag to be told of
LAG = 0.2  # in the median of these steps, beyond the median of the others
OF_STEP = 0.05  # and no less than this share of a step, or nobody would mend it
WRITE_SECONDS = 10.0


class RankTimes:
    """Own seconds of every rank by phase, over the steps of this start but the first, which warms up. Every rank holds one; rank 0 writes.

    `steps`: how many; `sums`: float64 [world, phases].
    """

    def __init__(self, run: RunFolder):
        self.run, self.steps = run, 0
        self.places = parallel.gather({"host": os.uname().nodename, **parallel.coordinates()})
        self.sums = np.zeros((len(self.places), len(PHASES)))
        self._window: deque[np.ndarray] = deque(maxlen=WINDOW)
        self._step_seconds: deque[float] = deque(maxlen=WINDOW)
        self._told: set[tuple[int, int]] = set()
        self._begun = self._ended = False
        self._at = self._written = time.monotonic()
        phase_clock.take()

    def end_step(self, step: int) -> bool:
        """Collective, at the end of a step: whether a rank was asked to stop (SIGTERM, SIGUSR1); then the step is saved and the run leaves.

        The one collective tells both.
        """
        waits.settle()
        own = phase_clock.take()
        rows = parallel.gather_row([float(health.asked_to_stop()), *(own.get(phase, 0.0) for phase in PHASES)])
        now = time.monotonic()
        if self._begun and len(rows) > 1:
            self._add(step, rows[:, 1:], now - self._at)
        self._begun, self._at = True, now
        return bool(rows[:, 0].any())

    def _add(self, step: int, own: np.ndarray, seconds: float) -> None:
        self.steps += 1
        self.sums += own
        self._window.append(own)
        self._step_seconds.append(seconds)
        if not self.run.writes:
            return
        for phase, rank, lag in self._laggards():
            mean = float(np.mean([row[rank, phase] for row in self._window]))
            self.run.say(f"step {step} rank {rank} ({_place(self.places[rank])}) holds up the others in phase {PHASES[phase]}: "
                         f"{mean:.3g} s of its own work a step, {lag:.3g} s more than the median of the others (last {WINDOW} steps)")
        if time.monotonic() - self._written > WRITE_SECONDS:
            self.write()

    def _laggards(self) -> list[tuple[int, int, float]]:
        """(phase, rank, seconds a step behind the median of the others) of those that began to lag: each is told of once."""
        if len(self._window) < WINDOW:
            return []
        window, step = np.stack(tuple(self._window)), np.median(self._step_seconds)  # [steps, world, phases]
        found = []
        for phase in range(len(PHASES)):
            times = window[:, :, phase]
            rank = int(times.mean(0).argmax())
            others = np.median(np.delete(times, rank, 1), 1)
            lags = times[:, rank] - others
            lagging = np.median(lags) > max(LAG * np.median(others), OF_STEP * step)
            if lagging and (phase, rank) not in self._told:
                found.append((phase, rank, float(lags.mean())))
            self._told = {told for told in self._told if told[0] != phase} | ({(phase, rank)} if lagging else set())
        return found

    def slowest(self) -> list[dict]:
        """Of each phase that took time: its slowest rank, seconds of own work a step, and the median of the other ranks."""
        means = self.sums / max(1, self.steps)
        found = []
        for phase, times in zip(PHASES, means.T, strict=True):
            if len(times) > 1 and times.any():
                rank = int(times.argmax())
                found.append({"phase": phase, "rank": rank, "place": _place(self.places[rank]), "seconds": float(times[rank]),
                              "others": float(np.median(np.delete(times, rank)))})
        return found

    def write(self) -> None:
        """Rank 0 writes ranks.json, where there are several ranks and a step to tell of."""
        if not self.run.writes or not self.steps:
            return
        self._written = time.monotonic()
        means = {phase: times.tolist() for phase, times in zip(PHASES, (self.sums / self.steps).T, strict=True) if times.any()}
        write_beside(self.run.path / RANKS_FILE, json.dumps(plain({
            "steps": self.steps, "ranks": self.places, "own_seconds": means, "slowest": self.slowest()}), indent=1) + "\n")

    def summary(self) -> dict[str, str]:
        """Writes, and the row of the closing summary: nothing of one rank."""
        self.write()
        words = [f"{row['phase']} rank {row['rank']}, {row['seconds']:.3g} s a step (the others {row['others']:.3g})"
                 for row in self.slowest()]
        return {"slowest rank": "; ".join(words)} if words else {}


def _place(place: dict) -> str:
    return ", ".join([place["host"], *(f"{name} {index}" for name, index in place.items() if name != "host")])
