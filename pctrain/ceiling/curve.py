"""A score-against-compute curve, independent of the file it was read from."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from pctrain.ceiling.checks import MAX_SCORE


@dataclass(frozen=True)
class Curve:
    """The scores of one RL run, in percent, against EFLOPs from the switch point.

    `eflops` and `scores` are float64 [n]. The switch point itself is not among the points: its score is `p_sft`.
    """

    dataset: str
    start_step: int | None  # None: the file names the curve but no SFT step
    eflops_sft: float | None
    p_sft: float
    eflops: np.ndarray
    scores: np.ndarray
    p_sft_se: float | None = None  # standard error of p_sft in points; None: not stated
    score_se: float | None = None  # typical standard error of one score in points; None: not stated
    max_score: float = MAX_SCORE  # the highest possible score, percent

    @property
    def name(self) -> str:
        """The data set, and the SFT step if the file states one."""
        return self.dataset if self.start_step is None else f"{self.dataset}, step {self.start_step}"

    def first(self, share: float) -> int:
        """Return how many points the first `share` of this curve has."""
        return first_points(len(self.eflops), share)


def first_points(n: int, share: float) -> int:
    """Return how many of `n` points are in the first `share`, by index; all of them for a share of 1.

    The small constant covers rounding: 0.07 * 100 is 7.000000000000001.
    """
    return int(share * n + 1e-9)
