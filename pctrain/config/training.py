"""Sections `sft` and `rl`, and the optimizer of each."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from pctrain.config.algorithm import DEFAULT, AlgorithmChoice, AlgorithmOptions, built_in
from pctrain.config.section import Section


class OptimizerConfig(Section):
    """Adam with decoupled weight decay, and the learning rate schedule."""

    lr: float = Field(1e-5, gt=0, description="peak learning rate")
    min_lr: float = Field(0.0, ge=0, description="learning rate at the end of a cosine or wsd schedule")
    schedule: Literal["constant", "cosine", "wsd"] = Field(
        "constant",
        description="learning rate after the warm-up; wsd: constant, then linear to min_lr over the last `decay` steps",
    )
    warmup: int = Field(0, ge=0, description="linear warm-up, optimizer steps")
    decay: int = Field(0, ge=0, description="only for wsd: decay at the end, optimizer steps")
    beta1: float = Field(0.9, ge=0, lt=1, description="Adam's first decay rate")
    beta2: float = Field(0.95, ge=0, lt=1, description="Adam's second decay rate")
    eps: float = Field(1e-8, gt=0, description="Adam's epsilon")
    weight_decay: float = Field(0.01, ge=0, description="decoupled weight decay")
    clip: float = Field(1.0, gt=0, description="largest global gradient norm; a larger gradient is scaled down to it")
    skip_above: float | None = Field(
        None,
        gt=0,
        description="skip an update whose gradient norm is above this (UPT's published code: 80); default: never",
    )
    max_skipped: int = Field(
        3, ge=1, description="consecutive updates with a loss or gradient that is not finite, after which the run stops"
    )


class RLOptimizerConfig(OptimizerConfig):
    """The optimizer of RL, with a smaller learning rate."""

    lr: float = Field(1e-6, gt=0, description="peak learning rate")


class SFTConfig(Section):
    """Supervised fine-tuning on expert trajectories."""

    steps: int = Field(1000, ge=1, description="optimizer steps")
    epochs: float | None = Field(None, gt=0, description="passes over the training set, instead of sft.steps")
    batch_size: int = Field(32, ge=1, description="trajectories per optimizer step, over all ranks")
    token_budget: int = Field(
        1024, ge=16, description="tokens of one pack (micro-batch) on one rank; a multiple of parallel.tensor"
    )
    val_every: int = Field(50, ge=1, description="steps between exact validation losses")
    eval_every: int = Field(0, ge=0, description="steps between scores on data.test; 0: never")
    checkpoint_every: int = Field(100, ge=1, description="steps between checkpoints; the last step always has one")
    stop_after: Literal["stable", "mild", "never"] = Field(
        "never",
        description="stop once the validation loss has left this regime for good (see ceiling.delta and delta2)",
    )
    optimizer: OptimizerConfig = Field(default_factory=OptimizerConfig)


def _default_algorithm() -> AlgorithmOptions:
    return built_in()[DEFAULT].model_validate({})


class RLConfig(Section):
    """Reinforcement learning: the algorithm, the size of a step, and dynamic sampling."""

    algorithm: AlgorithmChoice = Field(
        default_factory=_default_algorithm,
        description="a name, or {name: NAME, OPTION: VALUE, ...}. grpo; dapo_d: GRPO with dynamic sampling; dapo_dc: "
        "dapo_d with clip-higher; luffy, srft, upt and prefix_rft: also learn from expert trajectories; or your own "
        "class as module:Class (docs/your_own.md)",
    )
    steps: int = Field(50, ge=1, description="RL steps, each with one batch of rollouts")
    prompts: int = Field(32, ge=1, description="prompts per step, over all ranks")
    group: int = Field(
        8, ge=2, description="rollouts per prompt; for luffy and srft the expert's trajectory replaces one of them"
    )
    updates: int = Field(
        1, ge=1, description="optimizer updates per step; above 1 the policy moves within a step, and clipping matters"
    )
    token_budget: int = Field(
        2048, ge=16, description="tokens of one pack (micro-batch) on one rank; a multiple of parallel.tensor"
    )
    reference_offload: bool = Field(
        False, description="keep the reference model in host memory between its passes (GPU only; needs a KL)"
    )
    keep_low: int = Field(
        1, ge=0, description="dynamic sampling: keep a prompt if at least this many rollouts are correct"
    )
    keep_high: int | None = Field(
        None, ge=0, description="dynamic sampling: and at most this many; default: rl.group - 1"
    )
    max_rounds: int = Field(10, ge=1, description="dynamic sampling: maximum number of sampling rounds per step")
    round_prompts: int = Field(48, ge=1, description="dynamic sampling: prompts per sampling round")
    truncated: Literal["wrong", "masked"] = Field(
        "wrong",
        description="what to do with a response cut off at rollout.max_response: count it as wrong, or judge it but "
        "do not train on it (masked)",
    )
    eval_every: int = Field(10, ge=1, description="steps between scores on data.test")
    checkpoint_every: int = Field(10, ge=1, description="steps between checkpoints; the last step always has one")
    stop_within: float | None = Field(
        None,
        gt=0,
        description="stop once the ceiling is identified and both ends of its 90% interval are within this many "
        "points of the estimate; default: never",
    )
    optimizer: RLOptimizerConfig = Field(default_factory=RLOptimizerConfig)
