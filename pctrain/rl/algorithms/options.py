"""The options of each algorithm, and its traits. No torch is imported: config, planner and study costs read this file.

A field is an option of `rl.algorithm`, such as `rl.algorithm: {name: upt, gamma: 2}`. A class inherits the options of
the algorithm that it varies, overrides the defaults in which its paper differs, and names in `unused` what it does not
read.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from pydantic import Field

from pctrain.config.algorithm import AlgorithmOptions

_STD = "divide the advantage by the standard deviation of the group's rewards"
_ENTROPY = "coefficient of the entropy bonus"


class GRPOOptions(AlgorithmOptions):
    """GRPO (arXiv 2402.03300)."""

    name: str = "grpo"
    clip_low: float = Field(
        0.2,
        gt=0,
        lt=1,
        description="the ratio is clipped below at 1 - clip_low, and above at 1 + clip_low unless there is a clip_high",
    )
    dual_clip: float | None = Field(
        None,
        gt=1,
        description="dual clip: upper bound of the ratio for negative advantages (arXiv 1912.09729); default: none",
    )
    kl_coef: float = Field(
        0.0,
        ge=0,
        description="coefficient of the KL to the reference model (the weights the run starts from); 0: no KL",
    )
    kl_kind: Literal["k1", "k2", "k3"] = Field(
        "k3",
        description="estimator of the KL (joschu.net/blog/kl-approx.html); k1 is subtracted from the reward, k2 and "
        "k3 are added to the loss",
    )
    std_normalise: bool = Field(False, description=_STD)
    leave_one_out: bool = Field(
        False, description="subtract the mean reward of the other members of the group (RLOO, arXiv 2402.14740)"
    )
    entropy_coef: float = Field(0.001, ge=0, description=_ENTROPY)
    normaliser: Literal["token", "sequence", "fixed", "published"] = Field(
        "token",
        description="what the sum of token losses is divided by. token: the number of tokens; sequence: each "
        "response's length, then the number of responses (GRPO, arXiv 2402.03300); fixed: responses x "
        "rollout.max_response (Dr. GRPO, arXiv 2503.20783); published: rollout.max_response for RL tokens, their "
        "number for SFT tokens (published code of LUFFY, UPT, Prefix-RFT)",
    )
    overlong_buffer: int = Field(
        0,
        ge=0,
        description="the penalty on long responses rises linearly over this many tokens before rollout.max_response "
        "(DAPO, arXiv 2503.14476); 0: no penalty",
    )
    overlong_weight: float = Field(
        1.0, gt=0, description="penalty on a response of rollout.max_response tokens, subtracted from its reward"
    )
    is_correction: Literal["none", "token", "sequence"] | None = Field(
        None,
        description="weight sampled tokens by min(learner's probability / engine's, is_cap), per token or per "
        "response (sequence); default: token in bfloat16, none in float32",
    )
    is_cap: float = Field(2.0, gt=0, description="cap of that weight (truncated importance sampling, TIS)")

    @property
    def kl_in_reward(self) -> bool:
        """True if the KL is subtracted from the reward instead of added to the loss."""
        return self.kl_coef > 0 and self.kl_kind == "k1"

    def streams_from_pass(self, updates: int) -> frozenset[str]:
        """Return which of old_logprob, ref_logprob and entropy a pass without gradients makes before the updates."""
        streams = set()
        if updates > 1 or self.is_correction == "sequence" or self.kl_in_reward:
            streams.add("old_logprob")
        if self.kl_coef:
            streams.add("ref_logprob")
        return frozenset(streams)

    def problems(self, group: int, max_response: int) -> Iterator[str]:
        """Yield a message if the overlong penalty begins before the response."""
        if self.overlong_buffer > max_response:
            yield (
                f"rl.algorithm.overlong_buffer = {self.overlong_buffer} tokens, but a response has {max_response} at "
                "most (rollout.max_response)"
            )


class DAPOdOptions(GRPOOptions):
    """DAPO_d (arXiv 2512.11470): GRPO with dynamic sampling."""

    dynamic_sampling = True
    name: str = "dapo_d"


class DAPOdcOptions(DAPOdOptions):
    """DAPO_dc (arXiv 2512.11470, after arXiv 2503.14476): GRPO with dynamic sampling and clip-higher."""

    name: str = "dapo_dc"
    clip_high: float = Field(0.28, gt=0, description="upper clip of the ratio: 1 + clip_high")
    std_normalise: bool = Field(True, description=_STD)
    entropy_coef: float = Field(0.0, ge=0, description=_ENTROPY)


class LUFFYOptions(GRPOOptions):
    """LUFFY (arXiv 2504.14945): GRPO with the expert's trajectory as the last member of each group."""

    needs_expert = True
    expert_in_group = True
    unused = frozenset({"clip_low"})
    name: str = "luffy"


class SRFTOptions(GRPOOptions):
    """SRFT (arXiv 2506.19767): SFT and RL in one loss, without a ratio and without a KL."""

    needs_expert = True
    expert_in_group = True
    unused = frozenset({"clip_low", "dual_clip", "kl_coef", "kl_kind"})
    name: str = "srft"

    def streams_from_pass(self, updates: int) -> frozenset[str]:
        """Add the entropy, which weighs the terms of the loss."""
        return super().streams_from_pass(updates) | {"entropy"}


class UPTOptions(GRPOOptions):
    """UPT (arXiv 2509.04419): GRPO on prompts that the policy can solve, SFT on the others."""

    needs_expert = True
    name: str = "upt"
    gamma: int = Field(
        0,
        ge=0,
        description="learn a prompt from the expert if at most this many of its rollouts are correct (published code: "
        "0; 2 for Llama)",
    )
    sft_coef: float = Field(
        1.0, gt=0, description="weight of the expert's tokens (published code: 1.0; 0.3 for 1.5B parameters)"
    )

    def problems(self, group: int, max_response: int) -> Iterator[str]:
        """Yield a message if no prompt could be learned by RL."""
        yield from super().problems(group, max_response)
        if self.gamma >= group:
            yield (
                f"rl.algorithm.gamma = {self.gamma}: none of the {group} rollouts of a prompt (rl.group) is left over, "
                "so no prompt is learned by RL"
            )


class PrefixRFTOptions(GRPOOptions):
    """Prefix-RFT (arXiv 2507.01679): GRPO whose last rollout continues the beginning of the expert's answer."""

    needs_expert = True
    name: str = "prefix_rft"
    low_start: float = Field(
        0.95, ge=0, le=1, description="smallest share of the expert's response to use as prefix, first step"
    )
    low_end: float = Field(0.05, ge=0, le=1, description="the same at the last step; between them it follows a cosine")
    high: float = Field(0.95, ge=0, le=1, description="largest share of the expert's response to use as prefix")
    beta_a: float = Field(
        1.0,
        gt=0,
        description="first parameter of the Beta distribution that the share is drawn from (1 and 1: uniform)",
    )
    beta_b: float = Field(1.0, gt=0, description="second parameter of that distribution")
    entropy_share: float = Field(
        0.2, gt=0, le=1, description="share of the prefix's tokens to train on, those with the highest entropy"
    )

    def streams_from_pass(self, updates: int) -> frozenset[str]:
        """Add the entropy, which selects the tokens of the prefix."""
        return super().streams_from_pass(updates) | {"entropy"}

    def problems(self, group: int, max_response: int) -> Iterator[str]:
        """Yield a message if the bounds of the share cross."""
        yield from super().problems(group, max_response)
        if not self.low_end <= self.low_start <= self.high:
            yield (
                f"rl.algorithm: low_end = {self.low_end}, low_start = {self.low_start}, high = {self.high}: expected "
                "low_end <= low_start <= high"
            )


OPTIONS: dict[str, type[AlgorithmOptions]] = {
    "grpo": GRPOOptions,
    "dapo_d": DAPOdOptions,
    "dapo_dc": DAPOdcOptions,
    "luffy": LUFFYOptions,
    "srft": SRFTOptions,
    "upt": UPTOptions,
    "prefix_rft": PrefixRFTOptions,
}
