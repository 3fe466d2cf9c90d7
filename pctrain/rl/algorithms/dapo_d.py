"""DAPO_d (arXiv 2512.11470, after arXiv 2503.14476): GRPO with dynamic sampling.

A prompt whose rollouts are all right or all wrong has no advantage to learn from. Such groups are rejected, and more
prompts are sampled until the batch is full. The objective is GRPO's, with its symmetric clip.
"""

from __future__ import annotations

from pctrain.rl.algorithms.grpo import GRPO
from pctrain.rl.algorithms.options import DAPOdOptions


class DAPOd(GRPO):
    """GRPO with dynamic sampling."""

    Options = DAPOdOptions
