"""The model core that SFT and RL share: megatron-core's model, optimizer, schedules and checkpoints behind one small class."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pctrain.core.learner import Learner, Update

__all__ = ["Learner", "Update"]


def __getattr__(name: str):
    """`Learner` and `Update` at their first use: torch and megatron-core take seconds, and `hf_config` is read by what needs neither."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from pctrain.core import learner

    return getattr(learner, name)
