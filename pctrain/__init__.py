"""pctrain: SFT on expert trajectories, then reinforcement learning, on megatron-core, with an estimate of RL's ceiling.

Importing this package imports nothing heavy; every part is imported from its own module.
"""

import warnings

__version__ = "0.2.0"

# Every rank would print these at every start: optional CUDA packages that megatron-core does without, and names that
# megatron-core and torch's checkpointing use although torch 2.13 deprecates them. A user can do nothing about either.
# They are set here because they must precede any import of megatron-core.
warnings.filterwarnings("ignore", module=r"megatron\.core")
warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")
