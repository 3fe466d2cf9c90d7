"""Training losses that stand out from those before them."""

from __future__ import annotations

from collections import deque

import numpy as np

WINDOW = 50  # steps that a loss is compared with
FEWEST = 20  # before that there is nothing to compare with
# Robust standard deviations above the median. Losses of a falling or noisy curve stay below 4; a spike is a matter of tens.
DEVIATIONS = 8.0
_MAD_TO_SD = 1.4826  # of a normal distribution
# A window of nearly equal losses: less than this share of the median is no spike.
SMALLEST = 0.05


class Spikes:
    """Flags a loss above median + DEVIATIONS x (median absolute deviation as a standard deviation) of the window. State: the window."""

    def __init__(self, window: list[float] | None = None):
        self._losses = deque(window or [], maxlen=WINDOW)

    def add(self, loss: float) -> bool:
        """Whether `loss` is a spike. It joins the window unless it is one: the next of a row is judged by what was normal."""
        losses = np.array(self._losses)
        if not np.isfinite(loss):
            return True
        if len(losses) >= FEWEST:
            median = float(np.median(losses))
            spread = _MAD_TO_SD * float(np.median(np.abs(losses - median)))
            if loss > median + max(DEVIATIONS * spread, SMALLEST * median):
                return True
        self._losses.append(loss)
        return False

    def state(self) -> list[float]:
        return list(self._losses)
