"""DAPO_dc (arXiv 2512.11470, after arXiv 2503.14476): GRPO with dynamic sampling (d) and clip-higher (c).

Minimize the token mean of -min(r A, clip(r, 1 - clip_low, 1 + clip_high) A) with clip_high > clip_low, which leaves
unlikely tokens more room to grow. A is divided by the standard deviation of the group. No KL and no entropy bonus.
"""

from __future__ import annotations

import torch

from pctrain.rl.algorithms.dapo_d import DAPOd
from pctrain.rl.algorithms.options import DAPOdcOptions


class DAPOdc(DAPOd):
    """GRPO with dynamic sampling and clip-higher."""

    Options = DAPOdcOptions
    options: DAPOdcOptions

    def clip(self, ratio: torch.Tensor) -> torch.Tensor:
        """Return the ratio within asymmetric bounds."""
        return ratio.clamp(1 - self.options.clip_low, 1 + self.options.clip_high)
