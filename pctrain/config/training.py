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
        description="stop when the validation loss has left this regime for good (ceiling.delta, ceiling.delta2)",
    )
    optimizer: OptimizerConfig = Field(default_factory=OptimizerConfig)


def _default_algorithm() -> AlgorithmOptions:
    return built_in()[DEFAULT].model_validate({})


class RLConfig(Section):
    """Reinforcement learning: the algorithm, the size of a step, and dynamic sampling."""

    algorithm: AlgorithmChoice = Field(
        default_factory=_default_algorithm,
        description="a name, or {name: NAME, OPTION: VALUE, ...}. dapo_d: GRPO with dynamic sampling; dapo_dc: and "
        "clip-higher; luffy, srft, upt and prefix_rft learn from experts as well; or your class as module:Class "
        "(docs/your_own.md)",
    )
    steps: int = Field(50, ge=1, description="RL steps, each with one batch of rollouts")
    prompts: int = Field(32, ge=1, description="prompts per step, over all ranks")
    group: int = Field(
        8, ge=2, description="rollouts per prompt; luffy and srft: one less, and the expert's trajectory"
    )
    updates: int = Field(
        1, ge=1, description="optimizer updates per step; above 1 the policy moves within a step, and clipping matters"
    )
    token_budget: int = Field(
        2048, ge=16, description="tokens of one pack (micro-batch) on one rank; a multiple of parallel.tensor"
    )
    reference_offload: bool = Field(
        False, description="keep the reference in host memory between its passes (GPU only; with a KL)"
    )
    keep_low: int = Field(1, ge=0, description="dynamic sampling: fewest correct rollouts of a prompt that is kept")
    keep_high: int | None = Field(
        None, ge=0, description="dynamic sampling: most correct rollouts of such a prompt; default: group - 1"
    )
    max_rounds: int = Field(10, ge=1, description="dynamic sampling: most sampling rounds per step")
    round_prompts: int = Field(48, ge=1, description="dynamic sampling: prompts per sampling round")
    truncated: Literal["wrong", "masked"] = Field(
        "wrong",
        description="a response that rollout.max_response cuts counts as wrong, or is judged but not trained on "
        "(masked)",
    )
    eval_every: int = Field(10, ge=1, description="steps between scores on data.test")
    checkpoint_every: int = Field(10, ge=1, description="steps between checkpoints; the last step always has one")
    stop_within: float | None = Field(
        None,
        gt=0,
        description="stop when the ceiling is identified and its 90% interval reaches at most this far from the "
        "estimate, points; default: never",
    )
    optimizer: RLOptimizerConfig = Field(default_factory=RLOptimizerConfig)
