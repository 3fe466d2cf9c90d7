"""Rollouts: vLLM in the learner's process, its weights swapped in place."""

from pctrain.rollout.engine import Completion, Request, RolloutEngine, Sampling, Swap
from pctrain.rollout.seeds import sampling_seed

__all__ = ["Completion", "Request", "RolloutEngine", "Sampling", "Swap", "sampling_seed"]
