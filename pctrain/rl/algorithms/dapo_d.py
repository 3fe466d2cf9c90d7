"""DAPO_d (PAPER.md 4): GRPO with dynamic sampling.

Prompts whose rollouts are all right or all wrong are dropped, and more are sampled until the batch is full; the clip is symmetric.
"""

from __future__ import annotations

from pctrain.rl.algorithms.base import Algorithm


class DAPOd(Algorithm):
    dynamic_sampling = True
