"""The algorithms by their names in the config: those of this package, and a user's own as module:Class."""

from __future__ import annotations

import inspect
from pathlib import Path

from pctrain.common import plugins
from pctrain.common.errors import UserError
from pctrain.config.tree import RLConfig
from pctrain.rl.algorithms.base import Algorithm
from pctrain.rl.algorithms.dapo_d import DAPOd
from pctrain.rl.algorithms.dapo_dc import DAPOdc
from pctrain.rl.algorithms.grpo import GRPO
from pctrain.rl.algorithms.luffy import LUFFY
from pctrain.rl.algorithms.prefix_rft import PrefixRFT
from pctrain.rl.algorithms.srft import SRFT
from pctrain.rl.algorithms.upt import UPT

ALGORITHMS = {
    "grpo": GRPO,
    "dapo_d": DAPOd,
    "dapo_dc": DAPOdc,
    "luffy": LUFFY,
    "srft": SRFT,
    "upt": UPT,
    "prefix_rft": PrefixRFT,
}


def find(name: str) -> type[Algorithm]:
    """The class that `rl.algorithm` names. UserError where a user's own cannot be imported, or is none."""
    if not plugins.is_own(name):
        return ALGORITHMS[name]
    try:
        found = plugins.load(name, "algorithms", _is_algorithm)
    except plugins.LoadError as error:
        raise UserError(f"rl.algorithm = {name!r}: {error}") from None
    if not _is_algorithm(found):
        raise UserError(
            f"rl.algorithm = {name!r}: expected a subclass of pctrain.rl.algorithms.base.Algorithm, found {found!r:.80}"
        )
    return found


def source_files(name: str) -> list[Path]:
    """The file of a user's own algorithm: a run goes on only with the one that it began with. [] for those of this package."""
    return [Path(inspect.getfile(find(name)))] if plugins.is_own(name) else []


def build(rl: RLConfig, max_response: int) -> Algorithm:
    """`max_response`: `rollout.max_response`, tokens."""
    return find(rl.algorithm)(rl, max_response)


def _is_algorithm(found: object) -> bool:
    return isinstance(found, type) and issubclass(found, Algorithm)
