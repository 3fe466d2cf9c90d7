"""The SFT monitor: after each validation, in which regime SFT is so far, how sure it is that the minimum is passed, and what to do next.

Noise. `val_loss_se` is the spread over the sequences of the validation set. Two validations share that set, so most of it is common to
both and says nothing about their difference: what is left is the part of the change that differs from sequence to sequence, and the
wobble of the weights from one step to the next. Neither is known beforehand. The model, on the logarithm y of the losses in the order of
their compute x (in units of the median distance of two validations):

    y_i = T(x_i) + e_i,   e_i ~ N(0, s^2) independent,   T an integrated Wiener process (a cubic smoothing spline), its level and slope free

s has a prior around SHARED x val_loss_se / loss, as weak as PRIOR_WEIGHT validations; how much T bends, relative to s, is summed over a
grid (RATIOS) with equal weights before the data. Given that ratio everything is a Student t in closed form (Wahba, Spline Models for
Observational Data, 1990, section 1.5; O'Hagan & Forster, Bayesian Inference, 11.3). The steep fall at the beginning is left out
(WINDOW): it says nothing of the minimum, and would be taken for noise.

Hysteresis. A regime is entered after two validations in a row that are sure of it (SURE), and left for a milder one after two in a row
that doubt it (UNSURE), so the word does not flip on noise.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import numpy as np
from scipy import special

from pctrain.ceiling.regimes import MILD, SEVERE, STABLE
from pctrain.common.errors import UserError

SHARED = 0.2  # of val_loss_se is left in a difference: losses of a sequence at two checkpoints correlate by about 0.98
PRIOR_WEIGHT = 4.0
RATIOS = np.logspace(-5, 3, 17)  # variance of T's bend over one distance / s^2
WINDOW = 1.25  # validations from the first one below WINDOW x the lowest loss on
LEAST = 4  # validations in the window before anything is said about a minimum
MOST = 64  # are looked at; of more, the latest half of these and as many of those before
SURE, UNSURE = 0.95, 0.5
IN_A_ROW = 2

Advice = Literal["continue", "keep", "stop"]


@dataclass(frozen=True)
class Reading:
    """After a validation. `passed`: probability that the trend has been lower before; `left`, `severe`: that it lies above the stable
    band, and in the severe one, by the trend's minimum so far; `start`: the checkpoint of the lowest loss, None before the first."""

    regime: str
    passed: float
    left: float
    severe: float
    advice: Advice
    start: int | None

    def metrics(self) -> dict[str, float | str | int]:
        start = {} if self.start is None else {"rl_start": self.start}
        return {"regime": self.regime, "minimum_passed": self.passed, "advice": self.advice, **start}

    def line(self) -> str:
        """For train.log."""
        start = "there is no checkpoint for RL yet" if self.start is None else f"RL would start from step {self.start}"
        return f"{self.regime} so far | minimum passed {self.passed:.0%} | {self.advice}: {start}"

    def has_left(self, regime: str) -> bool:
        """Whether `regime` ("stable" or "mild") lies behind."""
        return self.regime in {STABLE: (MILD, SEVERE), MILD: (SEVERE,)}[regime]


class Monitor:
    """`add` every validation in order. Its state is these validations alone: a resumed run adds them again."""

    def __init__(self, delta: float, delta2: float):
        """Of the regimes (regimes.classify)."""
        self._bands = math.log1p(delta), math.log1p(delta2)
        self._start: tuple[float, int] | None = None  # (loss, step) of the best checkpoint
        self._x: list[float] = []
        self._y: list[float] = []
        self._relative_se: list[float] = []
        self._level = 0  # 0 stable, 1 mild, 2 severe
        self._kept = False
        self._votes: dict[str, int] = {}

    def add(self, step: int, eflops: float, loss: float, se: float, checkpoint: bool = True) -> Reading:
        """One validation: loss in nats and its standard error over sequences. `checkpoint`: this step has one, from which RL may start.

        UserError: a loss that is not finite and above 0, or compute that does not increase.
        """
        if not (math.isfinite(loss) and loss > 0 and math.isfinite(se) and se >= 0):
            raise UserError(
                f"step {step}: the validation loss is {loss:g} +- {se:g}; expected finite nats above 0. The run has diverged: "
                "lower sft.optimizer.lr or raise sft.optimizer.warmup"
            )
        if self._x and eflops <= self._x[-1]:
            raise UserError(
                f"step {step}: {eflops:g} EFLOPs after {self._x[-1]:g}: compute must increase from validation to validation"
            )
        if checkpoint and (self._start is None or loss < self._start[0]):
            self._start = loss, step
        self._x.append(eflops)
        self._y.append(math.log(loss))
        self._relative_se.append(se / loss)
        seen = self._window()
        trend = Trend(np.array(self._x)[seen], np.array(self._y)[seen], SHARED * self._relative_se[-1])
        left, severe = (trend.above_minimum(band) for band in self._bands)
        passed = trend.above_minimum(0.0)
        self._judge(passed, left, severe)
        advice: Advice = "stop" if self._level else "keep" if self._kept else "continue"
        return Reading(
            (STABLE, MILD, SEVERE)[self._level], passed, left, severe, advice, self._start and self._start[1]
        )

    def _window(self) -> np.ndarray:
        y = np.array(self._y)
        seen = np.arange(int(np.argmax(y <= y.min() + math.log(WINDOW))), len(y))
        if len(seen) > MOST:
            early, late = seen[: -MOST // 2], seen[-MOST // 2 :]
            thinned = early[np.linspace(0, len(early) - 1, MOST // 2 - 1).round().astype(int)]
            seen = np.union1d([*thinned, early[np.argmin(y[early])]], late)
        return seen

    def _judge(self, passed: float, left: float, severe: float) -> None:
        up, down = (left, severe)[min(self._level, 1)], (left, severe)[max(self._level - 1, 0)]
        if self._twice("up", self._level < 2 and up >= SURE):
            self._level += 1
        elif self._twice("down", self._level > 0 and down < UNSURE):
            self._level -= 1
        if self._twice("kept", not self._kept and passed >= SURE) or self._twice(
            "released", self._kept and passed < UNSURE
        ):
            self._kept = not self._kept

    def _twice(self, what: str, holds: bool) -> bool:
        self._votes[what] = self._votes.get(what, 0) + 1 if holds else 0
        if self._votes[what] < IN_A_ROW:
            return False
        self._votes[what] = 0
        return True


class Trend:
    """The posterior of T at the validations: x [n] increasing, y [n] log losses; `scale`: where the prior of s lies."""

    def __init__(self, x: np.ndarray, y: np.ndarray, scale: float):
        self.n = len(x)
        self.lowest = int(np.argmin(y))
        if self.n < LEAST:
            return
        spacing = (x - x[0]) / np.median(np.diff(x))
        q, d = _basis(tuple(spacing.round(6)))
        w = q.T @ y
        shrunk = 1.0 / (1.0 + RATIOS[:, None] * d)  # [ratios, n - 2]
        freedom = PRIOR_WEIGHT + self.n - 2
        squares = PRIOR_WEIGHT * max(scale, 1e-6) ** 2 + shrunk @ w**2
        log_weight = 0.5 * np.log(shrunk).sum(1) - 0.5 * freedom * np.log(squares)
        weight = np.exp(log_weight - log_weight.max())
        # e given y has mean P y and covariance s^2 (I - P), P = q diag(shrunk) q^T; T = y - e.
        self.freedom, self.weight = freedom, weight / weight.sum()
        self.variance = squares / freedom
        self._q, self._shrunk = q, shrunk
        self.mean = y - (shrunk * w) @ q.T  # [ratios, n]
        self.lowest = int(np.argmin(self.weight @ self.mean))

    def above_minimum(self, band: float) -> float:
        """Probability that T is now above its lowest (by the posterior mean) by more than `band`, in logarithms."""
        if self.n < LEAST or self.lowest == self.n - 1:
            return 0.0
        difference = self.mean[:, -1] - self.mean[:, self.lowest]
        of_noise = ((self._q[-1] - self._q[self.lowest]) ** 2 * self._shrunk).sum(1)
        sd = np.sqrt(self.variance * np.maximum(2.0 - of_noise, 1e-12))
        return float(self.weight @ special.stdtr(self.freedom, (difference - band) / sd))


@lru_cache(maxsize=256)
def _basis(x: tuple[float, ...]) -> tuple[np.ndarray, np.ndarray]:
    """q [n, n - 2], orthonormal and orthogonal to 1 and x, and d [n - 2]: q^T K q = diag(d), K the covariance of an integrated Wiener
    process that starts at 0 with slope 0."""
    at = np.array(x)
    low, gap = np.minimum(at[:, None], at), np.abs(at[:, None] - at)
    covariance = low**3 / 3 + gap * low**2 / 2
    complement = np.linalg.qr(np.column_stack([np.ones_like(at), at, np.eye(len(at))]))[0][:, 2:]
    d, u = np.linalg.eigh(complement.T @ covariance @ complement)
    return complement @ u, np.maximum(d, 0.0)
