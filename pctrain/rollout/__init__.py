"""Rollouts: vLLM in the learner's process, with its weights updated in place."""

from pctrain.rollout.engine import RolloutEngine, WeightUpdate
from pctrain.rollout.queue import Completion, Request
from pctrain.rollout.seeds import sampling_seed

__all__ = ["Completion", "Request", "RolloutEngine", "WeightUpdate", "sampling_seed"]
