"""The algorithms by their names in the config: those of this package, and a user's own as module:Class."""

from __future__ import annotations

import inspect
from pathlib import Path

from pctrain.common import plugins
from pctrain.config.algorithm import check_own, load_own
from pctrain.config.tree import RLConfig
from pctrain.rl.algorithms.base import Algorithm
from pctrain.rl.algorithms.dapo_d import DAPOd
from pctrain.rl.algorithms.dapo_dc import DAPOdc
from pctrain.rl.algorithms.grpo import GRPO
from pctrain.rl.algorithms.luffy import LUFFY
from pctrain.rl.algorithms.prefix_rft import PrefixRFT
from pctrain.rl.algorithms.srft import SRFT
from pctrain.rl.algorithms.upt import UPT

ALGORITHMS: dict[str, type[Algorithm]] = {
    "grpo": GRPO,
    "dapo_d": DAPOd,
    "dapo_dc": DAPOdc,
    "luffy": LUFFY,
    "srft": SRFT,
    "upt": UPT,
    "prefix_rft": PrefixRFT,
}


def find(name: str) -> type[Algorithm]:
    """Return the class of an algorithm. UserError if a user's own cannot be imported or is no algorithm."""
    if not plugins.is_own(name):
        return ALGORITHMS[name]
    return load_own(name, "a subclass of pctrain.rl.algorithms.grpo.GRPO (or of base.Algorithm)", _is_algorithm)


def source_files(name: str) -> list[Path]:
    """Return the file of a user's own algorithm, to which its runs are bound; [] for an algorithm of this package."""
    return [Path(inspect.getfile(find(name)))] if plugins.is_own(name) else []


def build(rl: RLConfig, max_response: int) -> Algorithm:
    """Return the algorithm of a run; `max_response` is `rollout.max_response`, in tokens."""
    algorithm = find(rl.algorithm.name)
    options = check_own(rl.algorithm)
    if not isinstance(options, algorithm.Options):
        raise TypeError(
            f"{algorithm.__name__} needs options of the class {algorithm.Options.__name__}, got {options!r}"
        )
    return algorithm(options, rl, max_response)


def _is_algorithm(candidate: object) -> bool:
    return isinstance(candidate, type) and issubclass(candidate, Algorithm) and not inspect.isabstract(candidate)
