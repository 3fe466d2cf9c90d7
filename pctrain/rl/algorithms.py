"""The algorithms by their names in the config."""

from __future__ import annotations

from pctrain.config import RLConfig
from pctrain.rl.dapo_dc import DAPO
from pctrain.rl.grpo import GRPO

Algorithm = GRPO | DAPO
ALGORITHMS = {"grpo": GRPO, "dapo_dc": DAPO}


def build(rl: RLConfig) -> Algorithm:
    return ALGORITHMS[rl.algorithm].from_config(rl)
