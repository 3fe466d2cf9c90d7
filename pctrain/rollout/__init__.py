"""Rollouts: vLLM in the learner's process, its weights swapped in place."""

from pctrain.rollout.engine import RolloutEngine, Swap
from pctrain.rollout.queue import Completion, Request
from pctrain.rollout.seeds import sampling_seed

__all__ = ["Completion", "Request", "RolloutEngine", "Swap", "sampling_seed"]
