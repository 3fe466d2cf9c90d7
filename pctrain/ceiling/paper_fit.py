"""The paper's own way from an RL curve to its ceiling (arXiv 2512.11470, appendix F), for comparison: `pctrain fit --method paper`.

1. Outliers: fit, M_i = 0.6745 (r_i - median r) / MAD of the residuals r, drop |M_i| > tau, and again until none is left.
2. Least trimmed squares on the rest: keep the h = floor(alpha N) smallest squared residuals, refit, until the kept set stays (C-steps).
3. A curve that collapses is described by no sigmoid: its ceiling is the best score before the collapse.

The split by index comes before: the caller gives the first points. What the paper leaves open: how a fit is made (here: least squares over
A, B, C, with P_sft and eps given), and how a collapse is found (here: as in fit.py). It knows no uncertainty. The paper's authors
choose tau (2.5 to 4), alpha (0.75 or 0.85), eps and the share of the points curve by curve; here they are options, the same for all.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from scipy.optimize import least_squares

from pctrain.ceiling import checks, collapse
from pctrain.ceiling.posterior import rise
from pctrain.common.errors import UserError

TAU, ALPHA = 3.0, 0.75
MIN_POINTS = 4  # A, B, C and one more
C_STEPS = 50  # the objective falls with every step, so that sets cannot come back but for rounding
# Starts of least squares, and bounds: without them A, B and C run away together on a curve that has not bent.
B_STARTS, C_STARTS = np.geomspace(0.2, 12.0, 13), np.geomspace(0.01, 10.0, 19)  # C as a share of the largest x
B_BOUNDS, C_BOUNDS = (0.05, 20.0), (1e-3, 1e3)


@dataclass(frozen=True)
class PaperFit:
    """Scores in percent, compute in EFLOPs. `b` and `c_mid` are None where the curve collapsed."""

    a_post: float
    pl_rl: float
    c_mid: float | None
    b: float | None
    eps: float
    p_sft: float
    n_points: int
    n_used: int
    collapsed_at: float | None
    train_rmse: float | None  # over the points kept
    used: np.ndarray = field(repr=False)  # bool [n]: the points kept by the last C-step

    def curve(self, x: Sequence[float]) -> np.ndarray:
        """Scores [n] at `x` [n] EFLOPs; where the curve collapsed, the ceiling."""
        x = np.asarray(x, dtype=np.float64)
        if self.b is None or self.c_mid is None:
            return np.full(x.shape, self.a_post)
        level = self.p_sft + self.eps
        return level + (self.a_post - level) * rise(x, np.float64(self.b), np.float64(self.c_mid))

    def as_row(self, dataset: str, start_step: int | None) -> dict:
        """The row of fits.json; what this method does not know is None."""
        known = ("p_sft", "a_post", "pl_rl", "c_mid", "b", "eps", "n_points", "n_used", "collapsed_at", "train_rmse")
        unknown = ("a_post_low", "a_post_high", "verdict", "prior_shift")
        return (
            {"dataset": dataset, "start_step": start_step, "method": "paper"}
            | {key: getattr(self, key) for key in known}
            | dict.fromkeys(unknown)
        )


def paper_fit(
    eflops: Sequence[float],
    scores: Sequence[float],
    p_sft: float,
    *,
    tau: float = TAU,
    alpha: float = ALPHA,
    eps: float = 0.0,
    max_score: float = 100.0,
) -> PaperFit:
    """Fit one RL curve: `eflops` [n] from the joint, increasing, `scores` [n] and `p_sft` in percent.

    Raises:
        UserError: the points cannot be fitted (fewer than MIN_POINTS), or an option is out of its range.
    """
    x, y, p_sft = checks.curve(eflops, scores, p_sft, max_score)
    if not tau > 0 or not 0.5 <= alpha <= 1 or not 0 <= eps <= max_score - p_sft:
        raise UserError(
            f"paper fit: tau must be above 0, alpha 0.5 to 1, eps 0 or more and P_sft + eps at most the maximum; "
            f"found tau {tau}, alpha {alpha}, eps {eps}, P_sft {p_sft:g}"
        )
    if len(x) < MIN_POINTS:
        raise UserError(f"paper fit: three numbers (A, B, C) need {MIN_POINTS} points or more, found {len(x)}")
    onset = collapse.onset(y, p_sft, collapse.noise_sd(y, collapse.NOISE_FLOOR))
    if onset is not None:
        return _collapsed(x, y, p_sft, onset)
    kept = _kept_by_z_score(x, y, p_sft + eps, tau, max_score)
    kept, (a, b, c) = _least_trimmed_squares(x, y, p_sft + eps, kept, alpha, max_score)
    residual = y[kept] - _sigmoid(x[kept], p_sft + eps, a, b, c)
    return PaperFit(
        a,
        a - p_sft,
        c,
        b,
        eps,
        p_sft,
        len(x),
        len(kept),
        None,
        float(np.sqrt(np.mean(residual**2))),
        _mask(kept, len(x)),
    )


def _collapsed(x: np.ndarray, y: np.ndarray, p_sft: float, onset: int) -> PaperFit:
    best = float(y[:onset].max(initial=p_sft))
    return PaperFit(
        best,
        best - p_sft,
        None,
        None,
        0.0,
        p_sft,
        len(x),
        onset,
        float(x[onset]),
        None,
        _mask(np.arange(onset), len(x)),
    )


def _kept_by_z_score(x: np.ndarray, y: np.ndarray, level: float, tau: float, top: float) -> np.ndarray:
    """Indices of the points that are no outliers. At least MIN_POINTS stay: fewer say nothing about three numbers."""
    kept = np.arange(len(x))
    while True:
        residual = y[kept] - _sigmoid(x[kept], level, *least_squares_fit(x[kept], y[kept], level, top))
        centred = residual - np.median(residual)
        mad = np.median(np.abs(centred))
        inside = 0.6745 * np.abs(centred) <= tau * mad
        if mad == 0 or inside.all() or inside.sum() < MIN_POINTS:
            return kept
        kept = kept[inside]


def _least_trimmed_squares(
    x: np.ndarray, y: np.ndarray, level: float, rest: np.ndarray, alpha: float, top: float
) -> tuple[np.ndarray, tuple[float, float, float]]:
    """Indices kept of `rest`, and A, B, C fitted to them."""
    h = max(int(np.floor(alpha * len(rest))), min(MIN_POINTS, len(rest)))
    kept = rest
    for _ in range(C_STEPS):
        found = least_squares_fit(x[kept], y[kept], level, top)
        squares = (y[rest] - _sigmoid(x[rest], level, *found)) ** 2
        nearest = np.sort(rest[np.argsort(squares, kind="stable")[:h]])
        if np.array_equal(nearest, kept):
            break
        kept = nearest
    return kept, least_squares_fit(x[kept], y[kept], level, top)


def least_squares_fit(x: np.ndarray, y: np.ndarray, level: float, top: float = 100.0) -> tuple[float, float, float]:
    """A in [level, top], B, C of the sigmoid from `level` that is nearest to the points [n] by least squares.

    A grid over B and C, with the best A of each in closed form, gives the start: no local optimum between its points is missed.
    """
    room = max(top - level, 1e-9)
    shapes = rise(x, B_STARTS[:, None, None], C_STARTS[:, None] * x[-1])  # [B, C, n]
    gain = np.clip((shapes @ (y - level)) / np.maximum((shapes**2).sum(-1), 1e-12), 0.0, room)
    loss = ((y - level - gain[..., None] * shapes) ** 2).sum(-1)
    at = np.unravel_index(np.argmin(loss), loss.shape)
    start = np.array([gain[at] / room, np.log(B_STARTS[at[0]]), np.log(C_STARTS[at[1]])])

    def residual(free: np.ndarray) -> np.ndarray:
        return level + free[0] * room * rise(x, np.exp(free[1]), np.exp(free[2]) * x[-1]) - y

    bounds = [(0.0, 1.0), np.log(B_BOUNDS), np.log(C_BOUNDS)]
    low, high = np.array(bounds).T
    found = least_squares(residual, np.clip(start, low + 1e-9, high - 1e-9), bounds=(low, high)).x
    return float(level + found[0] * room), float(np.exp(found[1])), float(np.exp(found[2]) * x[-1])


def _sigmoid(x: np.ndarray, level: float, a: float, b: float, c: float) -> np.ndarray:
    return level + (a - level) * rise(x, np.float64(b), np.float64(c))


def _mask(indices: np.ndarray, n: int) -> np.ndarray:
    mask = np.zeros(n, dtype=bool)
    mask[indices] = True
    return mask
