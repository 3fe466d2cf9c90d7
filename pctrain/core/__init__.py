"""The model core that SFT and RL share: megatron-core's model, optimizer, schedules and checkpoints behind one small class."""

import warnings

# What would otherwise be printed by every rank at every start: which optional CUDA packages megatron-core does without, and what it and
# torch's checkpointing call by names that torch 2.13 is about to retire. None of it is for the user to act on.
warnings.filterwarnings("ignore", module=r"megatron\.core")
warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")

from pctrain.core.core import Core, Update  # noqa: E402

__all__ = ["Core", "Update"]
