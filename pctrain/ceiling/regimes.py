"""Regimes of the SFT validation loss (arXiv 2512.11470) and the choice of RL start points, given the whole curve.

`monitor` judges a curve while it is still being measured.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike

from pctrain.common.errors import UserError

ADAPTIVE, STABLE, MILD, SEVERE, TRANSIENT = REGIMES = ("adaptive", "stable", "mild", "severe", "transient")


def classify(eflops: ArrayLike, losses: ArrayLike, delta: float = 0.02, delta2: float = 0.10) -> list[str]:
    """Return the regime of every point of a validation loss curve.

    `eflops` [n] must increase (steps work as well); `losses` [n] are in nats. L_min is the minimum of all the losses
    and T_stable = {L <= (1 + delta) L_min}. A point is `adaptive` before T_stable and `stable` in it. After the last
    stable point it is `mild`, or `severe` from (1 + delta2) L_min on. `transient` is a point that leaves the band
    between the first and the last stable one; the paper's definition does not name it.
    """
    x, loss = _checked(eflops, losses)
    if not 0 < delta < delta2:
        raise UserError(f"regimes: got delta {delta} and delta2 {delta2}. They must satisfy 0 < delta < delta2.")
    stable = loss <= (1 + delta) * loss.min()
    first, last = x[stable].min(), x[stable].max()
    severe = loss >= (1 + delta2) * loss.min()

    def regime(i: int) -> str:
        if stable[i]:
            return STABLE
        if x[i] < first:
            return ADAPTIVE
        if x[i] < last:
            return TRANSIENT
        return SEVERE if severe[i] else MILD

    return [regime(i) for i in range(len(x))]


def starts(
    steps: Sequence[int], losses: ArrayLike, checkpoints: Sequence[int], delta: float = 0.02, delta2: float = 0.10
) -> dict[str, int | None]:
    """Choose checkpoint steps to start RL from: {"early", "stable", "overfit"} -> step, or None if none qualifies.

    * `stable`: the checkpoint with the lowest loss.
    * `early`: the adaptive checkpoint nearest to half the stable step, where the model is useful already; the later one
      in a tie.
    * `overfit`: the last checkpoint, if its regime is mild or severe.

    A checkpoint between two validations gets the loss interpolated between them. A checkpoint outside the curve is not
    used, and neither is step 0 (no training).

    Args:
        steps: [n], of the validation curve.
        losses: [n], of the validation curve, nats.
        checkpoints: steps that have a checkpoint.
        delta: as in `classify`.
        delta2: as in `classify`.
    """
    x, loss = _checked(steps, losses)
    usable = sorted({int(step) for step in checkpoints if step > 0 and x[0] <= step <= x[-1]})
    if not usable:
        return {"early": None, "stable": None, "overfit": None}
    grid = np.union1d(x, usable)
    loss_at = dict(zip(grid, np.interp(grid, x, loss), strict=True))
    regime_at = dict(zip(grid, classify(grid, list(loss_at.values()), delta, delta2), strict=True))

    stable = min(usable, key=lambda step: loss_at[step])
    adaptive = [step for step in usable if regime_at[step] == ADAPTIVE and step < stable]
    early = min(adaptive, key=lambda step: (abs(step - stable / 2), -step), default=None)
    last = usable[-1]
    return {
        "early": early,
        "stable": stable,
        "overfit": last if regime_at[last] in (MILD, SEVERE) and last != stable else None,
    }


def _checked(eflops: ArrayLike, losses: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    x, loss = np.asarray(eflops, dtype=np.float64), np.asarray(losses, dtype=np.float64)
    if x.ndim != 1 or x.shape != loss.shape or not len(x):
        raise UserError(
            f"regimes: got losses of shape {loss.shape} and x values of shape {x.shape}. "
            "Give as many losses as x values, one or more."
        )
    if not (np.isfinite(x).all() and np.isfinite(loss).all()):
        raise UserError(
            "regimes: the validation curve has a value that is not finite. Leave out such points or train again."
        )
    if (np.diff(x) <= 0).any():
        raise UserError("regimes: x (EFLOPs or steps) of the validation curve must increase from point to point")
    if (loss <= 0).any():
        raise UserError("regimes: validation losses must be above 0 (mean negative log-likelihood in nats)")
    return x, loss
