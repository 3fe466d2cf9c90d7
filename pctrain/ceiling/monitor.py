"""The SFT monitor: after each validation it estimates the regime, whether the minimum has passed, and what to do next.

Noise. `val_loss_se` is the spread over the sequences of the validation set. Two validations share that set, so most of
it is common to both and says nothing about their difference. What remains is the part of the change that differs from
sequence to sequence, and the fluctuation of the weights from step to step. Neither is known in advance. The model works
on the logarithm y of the losses in the order of their compute x (in units of the median distance of two validations):

    y_i = T(x_i) + e_i,   e_i ~ N(0, s^2) independent

T is an integrated Wiener process (a cubic smoothing spline) with free level and slope. The prior of s is centered on
SHARED x val_loss_se / loss and weighs as much as PRIOR_WEIGHT validations. The ratio of T's bend to s is summed over a
grid (RATIOS) with equal prior weights. Given that ratio, everything is a Student t in closed form (Wahba, Spline Models
for Observational Data, 1990, section 1.5; O'Hagan & Forster, Bayesian Inference, 11.3). The steep fall at the beginning
is left out (WINDOW): it carries no information about the minimum and would be taken for noise.

Hysteresis. A regime is entered after two consecutive validations that are sure of it (SURE) and left for a milder one
after two that doubt it (UNSURE), so the reported regime does not flip on noise.
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

SHARED = (
    0.2  # share of val_loss_se left in a difference: losses of a sequence at two checkpoints correlate by about 0.98
)
PRIOR_WEIGHT = 4.0
RATIOS = np.logspace(-5, 3, 17)  # variance of T's bend over one distance / s^2
WINDOW = 1.25  # the window starts at the first validation below WINDOW x the lowest loss
MIN_VALIDATIONS = 4  # in the window, before the monitor says anything about a minimum
MAX_VALIDATIONS = 64  # used; of a longer history the latest half of these, and as many of the earlier ones
SURE, UNSURE = 0.95, 0.5
IN_A_ROW = 2

Advice = Literal["continue", "keep", "stop"]


@dataclass(frozen=True)
class Reading:
    """The state of SFT after a validation.

    `passed` is the probability that the trend has been lower before. `left` and `severe` are the probabilities that the
    trend is above the stable band, or in the severe band, of its minimum so far. `start` is the step of the checkpoint
    with the lowest loss, or None before the first checkpoint.
    """

    regime: str
    passed: float
    left: float
    severe: float
    advice: Advice
    start: int | None

    def metrics(self) -> dict[str, float | str | int]:
        """Return the fields of the metrics row."""
        start = {} if self.start is None else {"rl_start": self.start}
        return {"regime": self.regime, "minimum_passed": self.passed, "advice": self.advice, **start}

    def line(self) -> str:
        """Return the line of train.log."""
        start = "there is no checkpoint for RL yet" if self.start is None else f"RL would start from step {self.start}"
        return f"{self.regime} so far | minimum passed {self.passed:.0%} | {self.advice}: {start}"

    def has_left(self, regime: str) -> bool:
        """Return whether SFT is past `regime` ("stable" or "mild")."""
        return self.regime in {STABLE: (MILD, SEVERE), MILD: (SEVERE,)}[regime]


class Monitor:
    """The monitor of one SFT run. `add` every validation in order; a resumed run adds the earlier ones again."""

    def __init__(self, delta: float, delta2: float):
        """Set the bands of the regimes, as in regimes.classify."""
        self._bands = math.log1p(delta), math.log1p(delta2)
        self._start: tuple[float, int] | None = None  # (loss, step) of the best checkpoint
        self._x: list[float] = []
        self._y: list[float] = []
        self._relative_se: list[float] = []
        self._level = 0  # 0 stable, 1 mild, 2 severe
        self._kept = False
        self._votes: dict[str, int] = {}

    def add(self, step: int, eflops: float, loss: float, se: float, checkpoint: bool = True) -> Reading:
        """Add one validation and return the new reading.

        `loss` is in nats, `se` its standard error over sequences. `checkpoint`: RL may start from this step.

        Raises:
            UserError: the loss is not finite and above 0, or the compute does not increase.
        """
        if not (math.isfinite(loss) and loss > 0 and math.isfinite(se) and se >= 0):
            raise UserError(
                f"step {step}: the validation loss is {loss:g} +- {se:g}; expected finite nats above 0. The run has "
                "diverged: lower sft.optimizer.lr or raise sft.optimizer.warmup"
            )
        if self._x and eflops <= self._x[-1]:
            raise UserError(
                f"step {step}: {eflops:g} EFLOPs after {self._x[-1]:g}. Compute must increase from validation to "
                "validation."
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
        start = None if self._start is None else self._start[1]
        return Reading((STABLE, MILD, SEVERE)[self._level], passed, left, severe, self._advice(), start)

    def _advice(self) -> Advice:
        if self._level:
            return "stop"
        return "keep" if self._kept else "continue"

    def _window(self) -> np.ndarray:
        """Return the indices of the validations that the trend is fitted to."""
        y = np.array(self._y)
        seen = np.arange(int(np.argmax(y <= y.min() + math.log(WINDOW))), len(y))
        if len(seen) > MAX_VALIDATIONS:
            early, late = seen[: -MAX_VALIDATIONS // 2], seen[-MAX_VALIDATIONS // 2 :]
            thinned = early[np.linspace(0, len(early) - 1, MAX_VALIDATIONS // 2 - 1).round().astype(int)]
            seen = np.union1d([*thinned, early[np.argmin(y[early])]], late)
        return seen

    def _judge(self, passed: float, left: float, severe: float) -> None:
        """Update the regime and the advice, with hysteresis."""
        beyond = (left, severe)  # beyond[i]: probability of a regime above level i
        up, down = beyond[min(self._level, 1)], beyond[max(self._level - 1, 0)]
        if self._twice("up", self._level < 2 and up >= SURE):
            self._level += 1
        elif self._twice("down", self._level > 0 and down < UNSURE):
            self._level -= 1
        keep = self._twice("kept", not self._kept and passed >= SURE)
        if keep or self._twice("released", self._kept and passed < UNSURE):
            self._kept = not self._kept

    def _twice(self, what: str, holds: bool) -> bool:
        """Return whether `what` holds for the IN_A_ROW-th time in a row, and start counting anew if so."""
        self._votes[what] = self._votes.get(what, 0) + 1 if holds else 0
        if self._votes[what] < IN_A_ROW:
            return False
        self._votes[what] = 0
        return True


class Trend:
    """The posterior of T at the validations: x [n] increasing, y [n] log losses, `scale` the prior guess of s."""

    def __init__(self, x: np.ndarray, y: np.ndarray, scale: float):
        self.n = len(x)
        self.lowest = int(np.argmin(y))
        if self.n < MIN_VALIDATIONS:
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
        """Return the probability that T is now more than `band` (log) above its minimum by the posterior mean."""
        if self.n < MIN_VALIDATIONS or self.lowest == self.n - 1:
            return 0.0
        difference = self.mean[:, -1] - self.mean[:, self.lowest]
        of_noise = ((self._q[-1] - self._q[self.lowest]) ** 2 * self._shrunk).sum(1)
        sd = np.sqrt(self.variance * np.maximum(2.0 - of_noise, 1e-12))
        return float(self.weight @ special.stdtr(self.freedom, (difference - band) / sd))


@lru_cache(maxsize=256)
def _basis(x: tuple[float, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Return q [n, n - 2], orthonormal and orthogonal to 1 and x, and d [n - 2] with q^T K q = diag(d).

    K is the covariance of an integrated Wiener process that starts at 0 with slope 0.
    """
    at = np.array(x)
    low, gap = np.minimum(at[:, None], at), np.abs(at[:, None] - at)
    covariance = low**3 / 3 + gap * low**2 / 2
    complement = np.linalg.qr(np.column_stack([np.ones_like(at), at, np.eye(len(at))]))[0][:, 2:]
    d, u = np.linalg.eigh(complement.T @ covariance @ complement)
    return complement @ u, np.maximum(d, 0.0)
