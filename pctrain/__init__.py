"""pctrain: expert trajectories, then reinforcement learning, on megatron-core, with the ceiling of the run told in numbers.

Importing this package imports nothing heavy; every part is imported from its own module.
"""

__version__ = "0.1.0"
