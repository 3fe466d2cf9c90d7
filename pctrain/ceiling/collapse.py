"""What must not be fitted: isolated outliers, and everything from the onset of a collapse on."""

from __future__ import annotations

import numpy as np

NOISE_FLOOR = 0.25  # points: the least sd that outliers and collapses are judged by, where the scores' standard error is not given
# A point is isolated when it lies this many noise standard deviations from the medians of both its sides, outward.
OUTLIER_SDS = 5.0
SIDE = 3  # points of one side

# Collapse: MUST of the next WINDOW points lie below the best running median by more than max(DROP points, DROP_SDS noise sd).
WINDOW, MUST = 6, 4
DROP, DROP_SDS = 2.0, 4.0
RUNNING = 5  # points of the running median (trailing)
LAGS = (1, 3)
CALM_POINTS = 7  # the noise of a possible collapse is judged by the first half of the curve, by no fewer points than this


def noise_sd(scores: np.ndarray, floor: float) -> float:
    """Robust standard deviation of the noise of `scores` [n]: each point against the mean of its neighbours, by the median absolute value.

    A smooth curve cancels to first order; independent noise of sd s gives such a difference the sd s sqrt(1.5). Noise that is alike from
    point to point hides from nearest neighbours, so those LAGS points away are asked as well, and the larger answer counts.
    """
    found = [floor]
    for lag in LAGS:
        if len(scores) > 2 * lag:
            difference = scores[lag:-lag] - (scores[:-2 * lag] + scores[2 * lag:]) / 2
            found.append(1.4826 * float(np.median(np.abs(difference))) / np.sqrt(1.5))
    return max(found)


def isolated(scores: np.ndarray, sd: float) -> np.ndarray:
    """Mask [n] of single points far above, or far below, the running medians of both sides. The ends (one side only) are kept."""
    mask = np.zeros(len(scores), dtype=bool)
    for i in range(SIDE, len(scores) - SIDE):
        sides = np.median(scores[i - SIDE:i]), np.median(scores[i + 1:i + 1 + SIDE])
        mask[i] = max(scores[i] - max(sides), min(sides) - scores[i]) > OUTLIER_SDS * sd
    return mask


def onset(scores: np.ndarray, p_sft: float, sd: float) -> int | None:
    """Index of the first point of a collapse, or None. The best so far starts at the score of the SFT checkpoint."""
    drop = max(DROP, DROP_SDS * sd)
    best = p_sft
    for i in range(len(scores) - MUST + 1):
        if i >= RUNNING:
            best = max(best, float(np.median(scores[i - RUNNING:i])))
        low = scores[i:i + WINDOW] < best - drop
        if low[0] and low.sum() >= MUST:
            return i
    return None


def used_points(scores: np.ndarray, p_sft: float, floor: float) -> tuple[np.ndarray, int | None]:
    """Mask [n] of the points to fit, and the index of the first point of a collapse (None: there is none)."""
    sd = noise_sd(scores, floor)
    kept = np.flatnonzero(~isolated(scores, sd))
    # After a collapse the scores are wild; judged by the whole curve's noise it could hide itself.
    calm = min(sd, noise_sd(scores[:max(CALM_POINTS, len(scores) // 2)], floor))
    at = onset(scores[kept], p_sft, calm)
    used = np.zeros(len(scores), dtype=bool)
    used[kept[:at]] = True
    return used, None if at is None else int(kept[at])
