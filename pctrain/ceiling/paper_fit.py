"""The paper's pipeline from an RL curve to its ceiling (arXiv 2512.11470, appendix F): `pctrain fit --method paper`.

1. Outliers: fit, compute M_i = 0.6745 (r_i - median r) / MAD of the residuals r, drop |M_i| > tau, repeat until none is
   left.
2. Least trimmed squares on the rest: keep the h = floor(alpha N) smallest squared residuals, refit, repeat until the
   kept set stays the same (C-steps).
3. No sigmoid describes a curve that collapses. Its ceiling is the best score before the collapse.

The split by index comes before: the caller passes the first points. The paper leaves two things open: how a fit is made
(here: least squares over A, B, C, with P_sft and eps given) and how a collapse is detected (here: as in fit.py). The
method has no uncertainty. The paper's authors choose tau (2.5 to 4), alpha (0.75 or 0.85), eps and the share of the
points for each curve; here they are options, the same for all curves.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import ArrayLike
from scipy.optimize import least_squares

from pctrain.ceiling import checks, collapse
from pctrain.ceiling.posterior import rise
from pctrain.common.errors import UserError

TAU, ALPHA = 3.0, 0.75
MIN_POINTS = 4  # A, B, C and one more
C_STEPS = 50  # each step lowers the objective, so sets repeat only through rounding
# Starting points of least squares, and bounds: without them A, B and C diverge together on a curve that has not bent.
B_STARTS, C_STARTS = np.geomspace(0.2, 12.0, 13), np.geomspace(0.01, 10.0, 19)  # C as a share of the largest x
B_BOUNDS, C_BOUNDS = (0.05, 20.0), (1e-3, 1e3)


@dataclass(frozen=True)
class PaperFit:
    """The paper's fit of one curve. Scores are in percent, compute in EFLOPs.

    `b`, `c_mid` and `train_rmse` are None if the curve collapsed.
    """

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

    def curve(self, x: ArrayLike) -> np.ndarray:
        """Return the scores [n] at `x` [n] EFLOPs; for a collapsed curve that is the ceiling everywhere."""
        at = np.asarray(x, dtype=np.float64)
        if self.b is None or self.c_mid is None:
            return np.full(at.shape, self.a_post)
        return _sigmoid(at, self.p_sft + self.eps, self.a_post, self.b, self.c_mid)

    def as_row(self, dataset: str, start_step: int | None) -> dict[str, Any]:
        """Return the row of fits.json; fields that this method does not estimate are None."""
        estimated = (
            "p_sft",
            "a_post",
            "pl_rl",
            "c_mid",
            "b",
            "eps",
            "n_points",
            "n_used",
            "collapsed_at",
            "train_rmse",
        )
        not_estimated = ("a_post_low", "a_post_high", "verdict", "prior_shift")
        return (
            {"dataset": dataset, "start_step": start_step, "method": "paper"}
            | {key: getattr(self, key) for key in estimated}
            | dict.fromkeys(not_estimated)
        )


def paper_fit(
    eflops: ArrayLike,
    scores: ArrayLike,
    p_sft: float,
    *,
    tau: float = TAU,
    alpha: float = ALPHA,
    eps: float = 0.0,
    max_score: float = 100.0,
) -> PaperFit:
    """Fit one RL curve: `eflops` [n] from the switch point, increasing; `scores` [n] and `p_sft` in percent.

    Raises:
        UserError: the points cannot be fitted (fewer than MIN_POINTS), or an option is out of its range.
    """
    x, y, p_sft = checks.curve(eflops, scores, p_sft, max_score)
    if not tau > 0 or not 0.5 <= alpha <= 1 or not 0 <= eps <= max_score - p_sft:
        raise UserError(
            f"paper fit: got tau {tau}, alpha {alpha}, eps {eps} and P_sft {p_sft:g}. tau must be above 0, alpha 0.5 "
            f"to 1, eps 0 or more, and P_sft + eps at most the maximum of {max_score:g}."
        )
    if len(x) < MIN_POINTS:
        raise UserError(
            f"paper fit: got {len(x)} points. The three parameters A, B and C need {MIN_POINTS} points or more."
        )
    onset = collapse.onset(y, p_sft, collapse.noise_sd(y, collapse.NOISE_FLOOR))
    if onset is not None:
        return _collapsed(x, y, p_sft, onset)
    kept = _kept_by_z_score(x, y, p_sft + eps, tau, max_score)
    kept, (a, b, c) = _least_trimmed_squares(x, y, p_sft + eps, kept, alpha, max_score)
    residual = y[kept] - _sigmoid(x[kept], p_sft + eps, a, b, c)
    return PaperFit(
        a_post=a,
        pl_rl=a - p_sft,
        c_mid=c,
        b=b,
        eps=eps,
        p_sft=p_sft,
        n_points=len(x),
        n_used=len(kept),
        collapsed_at=None,
        train_rmse=float(np.sqrt(np.mean(residual**2))),
        used=_mask(kept, len(x)),
    )


def _collapsed(x: np.ndarray, y: np.ndarray, p_sft: float, onset: int) -> PaperFit:
    best = float(y[:onset].max(initial=p_sft))
    return PaperFit(
        a_post=best,
        pl_rl=best - p_sft,
        c_mid=None,
        b=None,
        eps=0.0,
        p_sft=p_sft,
        n_points=len(x),
        n_used=onset,
        collapsed_at=float(x[onset]),
        train_rmse=None,
        used=_mask(np.arange(onset), len(x)),
    )


def _kept_by_z_score(x: np.ndarray, y: np.ndarray, level: float, tau: float, top: float) -> np.ndarray:
    """Return the indices of the points that are not outliers; MIN_POINTS or more, since fewer cannot fix A, B and C."""
    kept = np.arange(len(x))
    while True:
        residual = y[kept] - _sigmoid(x[kept], level, *least_squares_fit(x[kept], y[kept], level, top))
        distance = np.abs(residual - np.median(residual))
        mad = np.median(distance)
        inside = 0.6745 * distance <= tau * mad
        if mad == 0 or inside.all() or inside.sum() < MIN_POINTS:
            return kept
        kept = kept[inside]


def _least_trimmed_squares(
    x: np.ndarray, y: np.ndarray, level: float, rest: np.ndarray, alpha: float, top: float
) -> tuple[np.ndarray, tuple[float, float, float]]:
    """Return the indices kept out of `rest`, and A, B, C fitted to them."""
    h = max(int(np.floor(alpha * len(rest))), min(MIN_POINTS, len(rest)))
    kept = rest
    for _ in range(C_STEPS):
        parameters = least_squares_fit(x[kept], y[kept], level, top)
        squares = (y[rest] - _sigmoid(x[rest], level, *parameters)) ** 2
        nearest = np.sort(rest[np.argsort(squares, kind="stable")[:h]])
        if np.array_equal(nearest, kept):
            break
        kept = nearest
    return kept, least_squares_fit(x[kept], y[kept], level, top)


def least_squares_fit(x: np.ndarray, y: np.ndarray, level: float, top: float = 100.0) -> tuple[float, float, float]:
    """Return A in [level, top], B and C of the sigmoid from `level` that fits the points [n] best by least squares.

    The start comes from a grid over B and C with the best A of each cell in closed form, so a local optimum is not
    mistaken for the global one.
    """
    room = max(top - level, 1e-9)
    shapes = rise(x, B_STARTS[:, None, None], C_STARTS[:, None] * x[-1])  # [B, C, n]
    gain = np.clip((shapes @ (y - level)) / np.maximum((shapes**2).sum(-1), 1e-12), 0.0, room)
    loss = ((y - level - gain[..., None] * shapes) ** 2).sum(-1)
    best_b, best_c = np.unravel_index(np.argmin(loss), loss.shape)
    start = np.array([gain[best_b, best_c] / room, np.log(B_STARTS[best_b]), np.log(C_STARTS[best_c])])

    def residual(free: np.ndarray) -> np.ndarray:
        return level + free[0] * room * rise(x, np.exp(free[1]), np.exp(free[2]) * x[-1]) - y

    bounds = [(0.0, 1.0), np.log(B_BOUNDS), np.log(C_BOUNDS)]
    low, high = np.array(bounds).T
    best = least_squares(residual, np.clip(start, low + 1e-9, high - 1e-9), bounds=(low, high)).x
    return float(level + best[0] * room), float(np.exp(best[1])), float(np.exp(best[2]) * x[-1])


def _sigmoid(x: np.ndarray, level: float, a: float, b: float, c: float) -> np.ndarray:
    return level + (a - level) * rise(x, b, c)


def _mask(indices: np.ndarray, n: int) -> np.ndarray:
    mask = np.zeros(n, dtype=bool)
    mask[indices] = True
    return mask
