"""Loss spikes: training losses far above those of the steps before."""

from __future__ import annotations

from collections import deque

import numpy as np

WINDOW = 50  # steps that a loss is compared with
FEWEST = 20  # with fewer steps there is nothing to compare with
# Robust standard deviations above the median. Losses of a falling or noisy curve stay below 4; a spike reaches tens.
DEVIATIONS = 8.0
_MAD_TO_SD = 1.4826  # of a normal distribution
# In a window of nearly equal losses, a rise by less than this share of the median is no spike.
SMALLEST = 0.05


class Spikes:
    """Flags a loss above median + DEVIATIONS x (median absolute deviation, as a standard deviation) of the window."""

    def __init__(self, window: list[float] | None = None):
        self._losses = deque(window or [], maxlen=WINDOW)

    def add(self, loss: float) -> bool:
        """Return whether `loss` is a spike. A spike does not join the window that later losses are compared with."""
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
        """Return the window, which a checkpoint stores."""
        return list(self._losses)
