"""The algorithms by their names in the config."""

from __future__ import annotations

from pctrain.config import RLConfig
from pctrain.rl.algorithm import Algorithm
from pctrain.rl.dapo_d import DAPOd
from pctrain.rl.dapo_dc import DAPOdc
from pctrain.rl.grpo import GRPO
from pctrain.rl.luffy import LUFFY
from pctrain.rl.prefix_rft import PrefixRFT
from pctrain.rl.srft import SRFT
from pctrain.rl.upt import UPT

ALGORITHMS = {"grpo": GRPO, "dapo_d": DAPOd, "dapo_dc": DAPOdc, "luffy": LUFFY, "srft": SRFT, "upt": UPT, "prefix_rft": PrefixRFT}


def build(rl: RLConfig, max_response: int) -> Algorithm:
    """`max_response`: `rollout.max_response`, tokens."""
    return ALGORITHMS[rl.algorithm](rl, max_response)
