"""The learner that SFT and RL share: megatron-core's model, optimizer, schedule and checkpoints behind one class."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pctrain.core.learner import Learner, Update

__all__ = ["Learner", "Update"]


def __getattr__(name: str) -> type:
    """Import `Learner` and `Update` at their first use: torch and megatron-core take seconds to import."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from pctrain.core import learner

    attribute: type = getattr(learner, name)
    return attribute
