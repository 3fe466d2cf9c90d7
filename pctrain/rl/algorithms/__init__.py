"""The RL algorithms, one file each. `grpo.py` has the maths that the others build on."""
