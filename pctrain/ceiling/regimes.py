"""Regimes of the SFT validation loss (arXiv 2512.11470, section on regimes), judged with the whole curve at hand, and RL start points.

While the curve is still being made, `monitor` judges it.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from pctrain.common.errors import UserError

ADAPTIVE, STABLE, MILD, SEVERE, TRANSIENT = REGIMES = ("adaptive", "stable", "mild", "severe", "transient")


def classify(eflops: Sequence[float], losses: Sequence[float], delta: float = 0.02, delta2: float = 0.10) -> list[str]:
    """Regime of every point of a validation loss curve. `eflops` [n] increasing (steps do as well), `losses` [n] in nats.

    With L_min the minimum of all losses given and T_stable = {L <= (1 + delta) L_min}: `adaptive` before T_stable, `stable` in it;
    after its last point `mild`, or `severe` from (1 + delta2) L_min on. `transient` is a point between the first and the last stable
    one that leaves the band; the paper's sets do not name it.
    """
    x, loss = _checked(eflops, losses)
    if not 0 < delta < delta2:
        raise UserError(f"regimes: need 0 < delta < delta2, found delta {delta}, delta2 {delta2}")
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


def minimum(losses: Sequence[float]) -> int:
    """Index of the smallest loss; the first of equal ones."""
    return int(np.argmin(np.asarray(losses, dtype=np.float64)))


def starts(
    steps: Sequence[int], losses: Sequence[float], checkpoints: Sequence[int], delta: float = 0.02, delta2: float = 0.10
) -> dict[str, int | None]:
    """Checkpoint steps to start RL from: {"early", "stable", "overfit"} -> step, or None where no checkpoint has that role.

    `steps` [n] and `losses` [n]: the validation curve; `checkpoints`: steps that have a checkpoint. A checkpoint between two
    validations takes the loss interpolated between them; one outside the curve, and step 0 (no training), is not used.
    `stable`: the lowest loss among the checkpoints. `early`: in the adaptive regime, nearest to half the stable step (by then the model
    is useful; a tie goes to the later one). `overfit`: the last checkpoint, if its regime is mild or severe.
    """
    x, loss = _checked(steps, losses)
    usable = sorted({int(c) for c in checkpoints if c > 0 and x[0] <= c <= x[-1]})
    if not usable:
        return {"early": None, "stable": None, "overfit": None}
    grid = np.union1d(x, usable)
    loss_at = dict(zip(grid, np.interp(grid, x, loss)))
    regime_at = dict(zip(grid, classify(grid, list(loss_at.values()), delta, delta2)))

    stable = min(usable, key=lambda step: loss_at[step])
    adaptive = [step for step in usable if regime_at[step] == ADAPTIVE and step < stable]
    early = min(adaptive, key=lambda step: (abs(step - stable / 2), -step), default=None)
    last = usable[-1]
    return {
        "early": early,
        "stable": stable,
        "overfit": last if regime_at[last] in (MILD, SEVERE) and last != stable else None,
    }


def _checked(x: Sequence[float], losses: Sequence[float]) -> tuple[np.ndarray, np.ndarray]:
    x, loss = np.asarray(x, dtype=np.float64), np.asarray(losses, dtype=np.float64)
    if x.ndim != 1 or x.shape != loss.shape or not len(x):
        raise UserError(f"regimes: need as many losses as x values, one or more; found {loss.shape} and {x.shape}")
    if not (np.isfinite(x).all() and np.isfinite(loss).all()):
        raise UserError(
            "regimes: the validation curve holds a value that is not finite; leave such points out or train again"
        )
    if (np.diff(x) <= 0).any():
        raise UserError("regimes: x (EFLOPs or steps) of the validation curve must increase from point to point")
    if (loss <= 0).any():
        raise UserError("regimes: validation losses must be above 0 (mean negative log-likelihood in nats)")
    return x, loss
