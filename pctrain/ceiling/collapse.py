"""What must not be fitted: isolated outliers, and everything from the onset of a collapse on."""

from __future__ import annotations

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

NOISE_FLOOR = 0.25  # points: the least sd that outliers and collapses are judged by, where the scores' standard error is not given
# A point is isolated when it lies this many noise standard deviations from the medians of both its sides, outward.
OUTLIER_SDS = 5.0
SIDE = 3  # points of one side

# Collapse: MUST of the next WINDOW points lie below the best running median by more than max(DROP points, DROP_SDS noise sd).
WINDOW, MUST = 6, 4
DROP, DROP_SDS = 2.0, 4.0
RUNNING = 5  # points of the running median (trailing)
LAGS = (1, 3)
CALM_POINTS = (
    7  # the noise of a possible collapse is judged by the first half of the curve, by no fewer points than this
)


def noise_sd(scores: np.ndarray, floor: float) -> float:
    """Robust standard deviation of the noise of `scores` [n]: each point against the mean of its neighbours, by the median absolute value.

    A smooth curve cancels to first order; independent noise of sd s gives such a difference the sd s sqrt(1.5). Noise that is alike from
    point to point hides from nearest neighbours, so those LAGS points away are asked as well, and the larger answer counts.
    """
    found = [floor]
    for lag in LAGS:
        if len(scores) > 2 * lag:
            difference = scores[lag:-lag] - (scores[: -2 * lag] + scores[2 * lag :]) / 2
            found.append(1.4826 * float(np.median(np.abs(difference))) / np.sqrt(1.5))
    return max(found)


def isolated(scores: np.ndarray, sd: float) -> np.ndarray:
    """Mask [n] of single points far above, or far below, the running medians of both sides. The ends (one side only) are kept."""
    mask = np.zeros(len(scores), dtype=bool)
    inner = scores[SIDE:-SIDE]
    if len(inner):
        medians = np.median(sliding_window_view(scores, SIDE), axis=1)  # of the SIDE points from each on
        before, after = medians[: len(inner)], medians[SIDE + 1 :]
        mask[SIDE:-SIDE] = (
            np.maximum(inner - np.maximum(before, after), np.minimum(before, after) - inner) > OUTLIER_SDS * sd
        )
    return mask


def onset(scores: np.ndarray, p_sft: float, sd: float) -> int | None:
    """Index of the first point of a collapse, or None. The best so far starts at the score of the SFT checkpoint."""
    if len(scores) < MUST:
        return None
    best = np.full(len(scores), float(p_sft))
    if len(scores) > RUNNING:
        running = np.median(sliding_window_view(scores, RUNNING), axis=1)[:-1]  # of the RUNNING points before each
        best[RUNNING:] = np.maximum(p_sft, np.maximum.accumulate(running))
    ahead = sliding_window_view(np.append(scores, np.full(WINDOW - 1, np.inf)), WINDOW)
    low = ahead < (best - max(DROP, DROP_SDS * sd))[:, None]
    found = np.flatnonzero(low[:, 0] & (low.sum(1) >= MUST))
    return int(found[0]) if len(found) else None


def used_points(scores: np.ndarray, p_sft: float, score_se: float | None) -> tuple[np.ndarray, int | None]:
    """Mask [n] of the points to fit, and the index of the first point of a collapse (None: there is none).

    `score_se`: standard error of a score, points, where it is given.
    """
    floor = NOISE_FLOOR if score_se is None else score_se
    sd = noise_sd(scores, floor)
    kept = np.flatnonzero(~isolated(scores, sd))
    # After a collapse the scores are wild; judged by the whole curve's noise it could hide itself.
    calm = min(sd, noise_sd(scores[: max(CALM_POINTS, len(scores) // 2)], floor))
    at = onset(scores[kept], p_sft, calm)
    used = np.zeros(len(scores), dtype=bool)
    used[kept[:at]] = True
    return used, None if at is None else int(kept[at])
