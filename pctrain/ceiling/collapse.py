"""Find the points that must not be fitted: isolated outliers, and everything from the onset of a collapse on."""

from __future__ import annotations

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

NOISE_FLOOR = 0.25  # points; the smallest noise sd assumed when the standard error of the scores is not given

# A point is isolated if it is this many noise standard deviations outside the medians of both its neighborhoods.
OUTLIER_SDS = 5.0
SIDE = 3  # points in the neighborhood on each side

# A collapse starts at a point that is below the best running median by more than max(DROP points, DROP_SDS noise sd),
# if at least MUST of the WINDOW points from it on are that low.
WINDOW, MUST = 6, 4
DROP, DROP_SDS = 2.0, 4.0
RUNNING = 5  # points in the trailing running median

LAGS = (1, 3)  # distances, in points, of the neighbors that the noise is measured against
CALM_POINTS = 7  # the noise used to detect a collapse comes from the first half of the curve, or from this many points


def noise_sd(scores: np.ndarray, floor: float) -> float:
    """Return a robust estimate of the noise sd of `scores` [n], at least `floor`.

    Each point is compared with the mean of its two neighbors, and the median absolute difference is scaled to an sd. A
    smooth curve cancels to first order, and independent noise of sd s gives such a difference the sd s sqrt(1.5).
    Correlated noise hides from nearest neighbors, so farther ones (LAGS) are used too. The larger estimate wins.
    """
    estimates = [floor]
    for lag in LAGS:
        if len(scores) > 2 * lag:
            difference = scores[lag:-lag] - (scores[: -2 * lag] + scores[2 * lag :]) / 2
            estimates.append(1.4826 * float(np.median(np.abs(difference))) / np.sqrt(1.5))
    return max(estimates)


def isolated(scores: np.ndarray, sd: float) -> np.ndarray:
    """Return a mask [n] of single points far above, or far below, the running medians on both sides.

    The points at either end have one side only and are never masked.
    """
    mask = np.zeros(len(scores), dtype=bool)
    inner = scores[SIDE:-SIDE]
    if len(inner):
        medians = np.median(sliding_window_view(scores, SIDE), axis=1)  # medians[i]: of the SIDE points from i on
        before, after = medians[: len(inner)], medians[SIDE + 1 :]
        above = inner - np.maximum(before, after)
        below = np.minimum(before, after) - inner
        mask[SIDE:-SIDE] = np.maximum(above, below) > OUTLIER_SDS * sd
    return mask


def onset(scores: np.ndarray, p_sft: float, sd: float) -> int | None:
    """Return the index of the first point of a collapse, or None. The best score so far starts at `p_sft`."""
    if len(scores) < MUST:
        return None
    best = np.full(len(scores), float(p_sft))
    if len(scores) > RUNNING:
        running = np.median(sliding_window_view(scores, RUNNING), axis=1)[:-1]  # of the RUNNING points before each
        best[RUNNING:] = np.maximum(p_sft, np.maximum.accumulate(running))
    ahead = sliding_window_view(np.append(scores, np.full(WINDOW - 1, np.inf)), WINDOW)
    low = ahead < (best - max(DROP, DROP_SDS * sd))[:, None]
    onsets = np.flatnonzero(low[:, 0] & (low.sum(1) >= MUST))
    return int(onsets[0]) if len(onsets) else None


def used_points(scores: np.ndarray, p_sft: float, score_se: float | None) -> tuple[np.ndarray, int | None]:
    """Return a mask [n] of the points to fit and the index of the first point of a collapse (None: no collapse).

    `score_se` is the standard error of one score in points, or None if it is not given.
    """
    floor = NOISE_FLOOR if score_se is None else score_se
    sd = noise_sd(scores, floor)
    kept = np.flatnonzero(~isolated(scores, sd))
    # Scores after a collapse are wild. Judged by the noise of the whole curve, a collapse could hide itself.
    calm = min(sd, noise_sd(scores[: max(CALM_POINTS, len(scores) // 2)], floor))
    first_collapsed = onset(scores[kept], p_sft, calm)
    used = np.zeros(len(scores), dtype=bool)
    used[kept[:first_collapsed]] = True
    return used, None if first_collapsed is None else int(kept[first_collapsed])
