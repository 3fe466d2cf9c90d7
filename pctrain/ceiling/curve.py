"""One score-against-compute curve, wherever it was read from."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from pctrain.ceiling.checks import MAX_SCORE


@dataclass(frozen=True)
class Curve:
    """One RL run: scores in percent against EFLOPs from the SFT/RL joint, both float64 [n], the joint itself excluded."""

    dataset: str
    start_step: int | None  # None: the file names the curve, not a step
    eflops_sft: float | None
    p_sft: float
    eflops: np.ndarray
    scores: np.ndarray
    p_sft_se: float | None = None  # standard error of p_sft, points; None: not stated
    score_se: float | None = None  # typical standard error of one score, points; None: not stated
    max_score: float = MAX_SCORE  # the highest score there can be, percent

    @property
    def name(self) -> str:
        return self.dataset if self.start_step is None else f"{self.dataset}, step {self.start_step}"

    def first(self, share: float) -> int:
        """Points of the first share of this curve."""
        return first_points(len(self.eflops), share)


def first_points(n: int, share: float) -> int:
    """Of n points, by index; all of them where the share is 1 (0.07 * 100 is 7.000000000000001)."""
    return int(share * n + 1e-9)
