"""Sections `sft` and `rl`, and the optimizer of each."""

from __future__ import annotations

from typing import Annotated, Literal, get_args

from pydantic import AfterValidator, Field
from pydantic_core import PydanticCustomError

from pctrain.common import plugins
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


BuiltIn = Literal["grpo", "dapo_d", "dapo_dc", "luffy", "srft", "upt", "prefix_rft"]


def _algorithm(name: str) -> str:
    if name in get_args(BuiltIn) or plugins.NAME.fullmatch(name):
        return name
    known = ", ".join(repr(known) for known in get_args(BuiltIn))
    own = "module:Class, such as my_algorithms:Mine of my_algorithms.py in the current directory"
    raise PydanticCustomError("algorithm", f"{known} or {own}")


AlgorithmName = Annotated[BuiltIn | str, AfterValidator(_algorithm)]
SYNCHRONISED = (
    "luffy",
    "srft",
    "upt",
    "prefix_rft",
)  # SFT and RL at once: they need an expert's trajectory for every problem


class RLConfig(Section):
    algorithm: AlgorithmName = Field(
        "dapo_dc",
        description="dapo_d: GRPO with dynamic sampling; dapo_dc: and clip-higher; luffy, srft, upt and prefix_rft learn from "
        "experts as well; or a class of your own, module:Class (docs/your_own.md)",
    )
    steps: int = Field(50, ge=1, description="RL steps (one rollout batch each)")
    prompts: int = Field(32, ge=1, description="prompts per step, over all ranks")
    group: int = Field(
        8, ge=2, description="rollouts per prompt; luffy and srft: one fewer, and the expert's trajectory"
    )
    updates: int = Field(
        1, ge=1, description="optimizer updates per step; above 1 the ratio leaves 1 and clipping matters"
    )
    token_budget: int = Field(
        2048, ge=16, description="tokens of one pack (micro-batch) on one rank; a multiple of parallel.tensor"
    )
    clip_low: float = Field(0.2, gt=0, lt=1, description="lower clip of the ratio: 1 - clip_low")
    clip_high: float = Field(
        0.28, gt=0, description="upper clip of the ratio: 1 + clip_high (dapo_dc; the others: clip_low on both sides)"
    )
    dual_clip: float | None = Field(
        None,
        gt=1,
        description="where the advantage is negative, the ratio counts for no more than this (arXiv 1912.09729); default: none",
    )
    std_normalise: bool | None = Field(
        None,
        description="divide the advantage by the group's standard deviation; default: as in the paper, dapo_dc alone",
    )
    leave_one_out: bool = Field(
        False, description="advantage against the mean of the others of the group (RLOO, arXiv 2402.14740)"
    )
    normaliser: Literal["token", "sequence", "fixed", "published"] = Field(
        "token",
        description="what the sum over tokens is divided by: their number (the paper); each response's length and the number of "
        "responses (GRPO, arXiv 2402.03300); responses x rollout.max_response (Dr. GRPO, arXiv 2503.20783); rollout.max_response alone, "
        "SFT terms by their own tokens (published code of LUFFY, UPT, Prefix-RFT)",
    )
    kl_coef: float = Field(
        0.0, ge=0, description="weight of the KL to the reference, the weights the run starts from; 0 (the paper): none"
    )
    kl_kind: Literal["k1", "k2", "k3"] = Field(
        "k3",
        description="its estimator (joschu.net/blog/kl-approx.html); k1 is taken off the reward, k2 and k3 are added to the loss",
    )
    reference_offload: bool = Field(
        False, description="keep the reference in host memory between its passes (GPU only)"
    )
    entropy_coef: float | None = Field(
        None,
        ge=0,
        description="weight of the entropy bonus; default: as in the paper, 0 for dapo_dc, 0.001 for the others",
    )
    overlong_buffer: int = Field(
        0,
        ge=0,
        description="tokens before rollout.max_response over which it is punished, linearly (DAPO, arXiv 2503.14476); 0: none",
    )
    overlong_weight: float = Field(
        1.0, gt=0, description="punishment, off the reward, of a response of rollout.max_response tokens"
    )
    is_correction: Literal["none", "token", "sequence"] | None = Field(
        None,
        description="weigh what was sampled by min(learner's probability / engine's, rl.is_cap), a token's or a whole response's; "
        "default: token in bfloat16, none in float32",
    )
    is_cap: float = Field(2.0, gt=0, description="largest such weight (truncated importance sampling, TIS)")
    upt_gamma: int = Field(
        0,
        ge=0,
        description="upt: rollouts of a prompt that are right, up to which it learns from the expert instead (0; 2 for Llama)",
    )
    upt_sft_coef: float = Field(
        1.0, gt=0, description="upt: weight of the expert's tokens (published code: 1.0; 0.3 for 1.5B parameters)"
    )
    prefix_low_start: float = Field(
        0.95, ge=0, le=1, description="prefix_rft: smallest share of the expert's prefix at the first step"
    )
    prefix_low_end: float = Field(
        0.05, ge=0, le=1, description="prefix_rft: the same at the last step, a cosine between them"
    )
    prefix_high: float = Field(0.95, ge=0, le=1, description="prefix_rft: largest share of the expert's prefix")
    prefix_beta_a: float = Field(
        1.0, gt=0, description="prefix_rft: first parameter of the Beta distribution between the two (1: uniform)"
    )
    prefix_beta_b: float = Field(1.0, gt=0, description="prefix_rft: its second parameter")
    prefix_entropy_share: float = Field(
        0.2,
        gt=0,
        le=1,
        description="prefix_rft: share of the prefix's tokens, those of the highest entropy, that are learnt from",
    )
    keep_low: int = Field(1, ge=0, description="dynamic sampling: fewest right rollouts of a prompt that is kept")
    keep_high: int | None = Field(
        None, ge=0, description="dynamic sampling: most right rollouts of such a prompt; default group - 1"
    )
    max_rounds: int = Field(10, ge=1, description="dynamic sampling: most sampling rounds per step")
    round_prompts: int = Field(48, ge=1, description="dynamic sampling: prompts sampled per round")
    truncated: Literal["wrong", "masked"] = Field(
        "wrong", description="responses cut at rollout.max_response: count as wrong, or are judged but not trained on"
    )
    eval_every: int = Field(10, ge=1, description="steps between scores on data.test")
    checkpoint_every: int = Field(10, ge=1, description="steps between checkpoints; the last step always has one")
    stop_within: float | None = Field(
        None,
        gt=0,
        description="stop when the ceiling is identified and its 90 % interval reaches no further than this from the estimate, "
        "points; default: never",
    )
    optimizer: RLOptimizerConfig = Field(default_factory=RLOptimizerConfig)
