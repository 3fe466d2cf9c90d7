"""pctrain: expert trajectories, then reinforcement learning, on megatron-core, with the ceiling of the run told in numbers.

Importing this package imports nothing heavy; every part is imported from its own module.
"""

import warnings

__version__ = "0.2.0"

# What would otherwise be printed by every rank at every start: which optional CUDA packages megatron-core does without, and what it and
# torch's checkpointing call by names that torch 2.13 is about to retire. None of it is for the user to act on. (Here, before any import
# of megatron-core.)
warnings.filterwarnings("ignore", module=r"megatron\.core")
warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")
