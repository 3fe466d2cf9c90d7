"""The model core that SFT and RL share: megatron-core's model, optimizer, schedules and checkpoints behind one small class."""

from pctrain.core.core import Core, Update

__all__ = ["Core", "Update"]
