"""GRPO (PAPER.md 4, 5; arXiv 2402.03300): minimise the token mean of -min(r A, clip(r, 1 - clip_low, 1 + clip_low) A).

r = pi / pi_old of a token, A = R - mean R over the group of its prompt. Every prompt counts, also those whose rollouts all earned the
same: their advantage is 0.
"""

from __future__ import annotations

from pctrain.rl.algorithms.base import Algorithm


class GRPO(Algorithm):
    """All of it is in `Algorithm`."""
