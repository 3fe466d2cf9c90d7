"""How much a step of a config computes: sequences, tokens, passes. Lengths are assumptions, told with the answer."""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil
from typing import Literal

import numpy as np

from pctrain.compute import flops
from pctrain.config.tree import Config, RLConfig
from pctrain.hf.config import HFConfig
from pctrain.plan.options import PlanOptions

Kind = Literal["sft", "rl"]
DYNAMIC = ("dapo_d", "dapo_dc")
KEPT = 0.5  # share of prompts that dynamic sampling keeps
PROMPT = 256


@dataclass(frozen=True)
class Work:
    """One step. `sequences` are trained on, in `updates` parts. In tokens: `prompt` and `response`, means; `longest`, the bound."""

    kind: Kind
    sequences: int
    updates: int
    prompt: int
    response: int
    longest: int
    token_budget: int
    passes: tuple[str, ...]  # without gradients, over all sequences: logprob, reference
    rounds: int  # of sampling, each of so many prompts and rollouts a prompt
    prompts: int
    group: int

    @property
    def length(self) -> int:
        return self.prompt + self.response

    @property
    def tokens(self) -> int:
        return self.sequences * self.length

    def micro_batches(self, data: int) -> int:
        """Packs of one update on a data parallel rank, filled to the last token."""
        return max(1, ceil(self.sequences / self.updates * self.length / data / self.token_budget))

    def micro_batch(self, data: int) -> int:
        """Positions of the largest one, should all of its sequences be as long as they may."""
        return min(self.token_budget, ceil(self.sequences / self.updates / data) * self.longest)

    def forward(self, hf: HFConfig, sequences: float) -> float:
        """FLOPs of a pass over so many sequences."""
        return flops.exact_forward(hf.shape, np.array([self.length])) * sequences

    def training(self, hf: HFConfig, recompute: flops.Recompute) -> float:
        """FLOPs of all updates of the step, with what is computed again."""
        return flops.exact_training(hf.shape, np.array([self.length]), recompute) * self.sequences


def passes(rl: RLConfig, dtype: str) -> tuple[str, ...]:
    """Passes without gradients before the update: rl/algorithm.py, `streams_from_pass`, and SRFT's weights by entropy.

    (rl.algorithms cannot be asked: torch comes with it. tests/plan/test_plan.py holds the two against each other.)
    """
    k1 = rl.kl_coef > 0 and rl.kl_kind == "k1"
    own = rl.algorithm in ("srft", "prefix_rft") or rl.updates > 1 or rl.is_correction == "sequence" or k1
    return (("logprob",) if own else ()) + (("reference",) if rl.kl_coef else ())


def work(kind: Kind, config: Config, hf: HFConfig, options: PlanOptions) -> Work:
    prompt = options.prompt or min(PROMPT, max(1, hf.context // 8))
    return _sft(config, hf, prompt, options.response) if kind == "sft" else _rl(config, hf, prompt, options.response)


def _sft(config: Config, hf: HFConfig, prompt: int, response: int | None) -> Work:
    sft, longest = config.sft, min(hf.context, config.sft.token_budget)
    prompt = min(prompt, longest - 1)
    response = min(response or max(1, longest // 2 - prompt), longest - prompt)
    return Work("sft", sft.batch_size, 1, prompt, response, longest, sft.token_budget, (), 0, 0, 0)


def _rl(config: Config, hf: HFConfig, prompt: int, response: int | None) -> Work:
    rl, rollout = config.rl, config.rollout
    longest = min(hf.context, rl.token_budget)
    prompt = min(prompt, rollout.max_prompt or prompt, max(1, longest - rollout.max_response))
    response = min(response or max(1, rollout.max_response // 2), rollout.max_response)
    rounds, prompts = 1, rl.prompts
    if rl.algorithm in DYNAMIC:
        rounds, prompts = min(rl.max_rounds, ceil(rl.prompts / (KEPT * rl.round_prompts))), rl.round_prompts
    group = rl.group - (rl.algorithm in ("luffy", "srft"))
    return Work(
        "rl",
        rl.prompts * rl.group,
        rl.updates,
        prompt,
        response,
        min(longest, prompt + rollout.max_response),
        rl.token_budget,
        passes(rl, config.model.dtype),
        rounds,
        prompts,
        group,
    )
