"""How much a step of a config computes: sequences, tokens, passes. Lengths are assumptions and printed as such."""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil

import numpy as np

from pctrain.compute import flops
from pctrain.config.tree import Config, RLConfig, RolloutConfig, SFTConfig
from pctrain.hf.config import HFConfig
from pctrain.plan.options import PlanOptions
from pctrain.run.config_file import Kind

KEPT = 0.5  # assumed share of prompts that dynamic sampling keeps
PROMPT = 256  # assumed mean prompt, tokens


@dataclass(frozen=True)
class Work:
    """The work of one step.

    Attributes:
        kind: "sft" or "rl".
        sequences: number of sequences that are trained on.
        updates: number of optimizer updates, each with an equal part of the sequences.
        prompt: mean length of a prompt, tokens.
        response: mean length of a response, tokens.
        longest: longest sequence, tokens.
        token_budget: tokens of a pack.
        passes: passes without gradients over all sequences: logprob, reference.
        rounds: sampling rounds.
        prompts: prompts per sampling round.
        group: rollouts per prompt.
    """

    kind: Kind
    sequences: int
    updates: int
    prompt: int
    response: int
    longest: int
    token_budget: int
    passes: tuple[str, ...]
    rounds: int
    prompts: int
    group: int

    @property
    def length(self) -> int:
        """Return the mean length of a sequence, tokens."""
        return self.prompt + self.response

    @property
    def tokens(self) -> int:
        """Return the tokens that are trained on."""
        return self.sequences * self.length

    def micro_batches(self, data: int) -> int:
        """Return the packs of one update on one of `data` data parallel ranks, each filled to the last token."""
        return max(1, ceil(self.sequences / self.updates * self.length / data / self.token_budget))

    def micro_batch(self, data: int) -> int:
        """Return the positions of the largest pack, in which all sequences have the longest length."""
        return min(self.token_budget, ceil(self.sequences / self.updates / data) * self.longest)

    def forward(self, hf: HFConfig, sequences: float) -> float:
        """Return the FLOPs of a forward pass over so many sequences."""
        return flops.exact_forward(hf.shape, np.array([self.length])) * sequences

    def training(self, hf: HFConfig, recompute: flops.Recompute) -> float:
        """Return the FLOPs of all updates of the step, including recomputation."""
        return flops.exact_training(hf.shape, np.array([self.length]), recompute) * self.sequences


def passes(rl: RLConfig) -> tuple[str, ...]:
    """Return the passes without gradients that precede the updates: logprob (with entropies), reference."""
    streams = rl.algorithm.streams_from_pass(rl.updates)
    own = ("logprob",) if streams - {"ref_logprob"} else ()
    return (*own, "reference") if "ref_logprob" in streams else own


def work(kind: Kind, config: Config, hf: HFConfig, options: PlanOptions) -> Work:
    """Return what one step of a config computes."""
    prompt = options.prompt or min(PROMPT, max(1, hf.context // 8))
    if kind == "sft":
        return _sft_work(config.sft, hf, prompt, options.response)
    return _rl_work(config.rl, config.rollout, hf, prompt, options.response)


def _sft_work(sft: SFTConfig, hf: HFConfig, prompt: int, response: int | None) -> Work:
    longest = min(hf.context, sft.token_budget)
    prompt = min(prompt, longest - 1)
    response = min(response or max(1, longest // 2 - prompt), longest - prompt)
    return Work(
        "sft",
        sequences=sft.batch_size,
        updates=1,
        prompt=prompt,
        response=response,
        longest=longest,
        token_budget=sft.token_budget,
        passes=(),
        rounds=0,
        prompts=0,
        group=0,
    )


def _rl_work(rl: RLConfig, rollout: RolloutConfig, hf: HFConfig, prompt: int, response: int | None) -> Work:
    longest = min(hf.context, rl.token_budget)
    prompt = min(prompt, rollout.max_prompt or prompt, max(1, longest - rollout.max_response))
    response = min(response or max(1, rollout.max_response // 2), rollout.max_response)
    rounds, prompts = 1, rl.prompts
    if rl.algorithm.dynamic_sampling:
        rounds, prompts = min(rl.max_rounds, ceil(rl.prompts / (KEPT * rl.round_prompts))), rl.round_prompts
    return Work(
        "rl",
        sequences=rl.prompts * rl.group,
        updates=rl.updates,
        prompt=prompt,
        response=response,
        longest=min(longest, prompt + rollout.max_response),
        token_budget=rl.token_budget,
        passes=passes(rl),
        rounds=rounds,
        prompts=prompts,
        group=rl.algorithm.rollouts(rl.group),
    )
