"""The mechanics that every algorithm shares: which rows a batch has, and their per-token streams.

The maths, advantages and loss, is in `grpo.py`. A row is a rollout (prompt, prefix, completion) or an expert's
trajectory. Its streams are float32 [L]:

    advantage        of the whole response, repeated on each of its tokens
    expert           1 on tokens that an expert wrote, else 0 (for algorithms that need an expert)
    rollout_logprob  log-prob as the engine computed it; NaN on tokens that it did not sample
    old_logprob, ref_logprob, entropy   from a pass without gradients, made before `finish`
    is_weight        importance weight of a whole response (is_correction=sequence), made by `finish`
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch

from pctrain.config.tree import RLConfig
from pctrain.data.problems import Problem
from pctrain.data.rows import make_row
from pctrain.rl import mismatch
from pctrain.rl.algorithms.options import GRPOOptions
from pctrain.rl.groups import ExpertMember, Group, Member, MemberRow, RolloutMember
from pctrain_kernels.linear_token_loss import Streams

EXPERT_REWARD = 1.0  # a trajectory of the training set is taken to be right

# Metrics that are 0 on an expert's tokens, so that their mean over the sampled tokens is a quotient of sums.
METRICS_OF_SAMPLED = ("ratio", "clip_share", "dual_clip_share", "is_weight", *mismatch.METRICS_OF_SAMPLED)


@dataclass(frozen=True)
class Algorithm(ABC):
    """An RL algorithm: what it does with groups of rollouts, and its loss.

    `Options` is the class of its options, which also declares its traits: `needs_expert`, `expert_in_group`,
    `dynamic_sampling`. It is in `options.py`, without torch, because config checks and cost estimates read it too.

    Attributes:
        options: `rl.algorithm`, with is_correction resolved for the model's dtype.
        rl: the section `rl`, for the size of a group and the number of updates.
        max_response: `rollout.max_response`, in tokens.
    """

    Options: ClassVar[type[GRPOOptions]] = GRPOOptions

    options: GRPOOptions
    rl: RLConfig
    max_response: int

    def __init_subclass__(cls) -> None:
        """Refuse traits on the algorithm itself: nothing reads them there."""
        for trait in ("needs_expert", "expert_in_group", "dynamic_sampling"):
            if trait in vars(cls):
                raise TypeError(f"{cls.__name__}.{trait} is not read: declare it in {cls.__name__}.Options")

    # ---- the maths -------------------------------------------------------------------------------------------------

    @abstractmethod
    def advantages(self, rewards: np.ndarray) -> np.ndarray:
        """Return the advantages of one group, float64 [members], from its rewards, float64 [members]."""

    @abstractmethod
    def loss(self, logprob: torch.Tensor, entropy: torch.Tensor, streams: Streams) -> tuple[torch.Tensor, Streams]:
        """Return the loss [n] and metrics {name: [n]} of n tokens; every value depends on its own token alone."""

    def batch_advantages(self, rewards: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Return the advantages of every group of a batch. Override it if they depend on the other groups."""
        return [self.advantages(rewards_of_group) for rewards_of_group in rewards]

    # ---- sampling --------------------------------------------------------------------------------------------------

    def prefixes(self, problem: Problem, step: int, total_steps: int, seed: int) -> list[list[int]]:
        """Return the expert tokens that each rollout of this prompt continues, [] for a plain rollout.

        The number of lists is the number of rollouts. The result depends on the arguments only.
        """
        return [[] for _ in range(self.options.rollouts(self.rl.group))]

    # ---- rows ------------------------------------------------------------------------------------------------------

    def members(self, group: Group) -> list[Member]:
        """Return the members of a group that become rows of the batch."""
        rollouts: list[Member] = [RolloutMember(group, index) for index in range(len(group.completions))]
        return [*rollouts, ExpertMember(group)] if self.options.expert_in_group else rollouts

    def rows(self, groups: Sequence[Group]) -> list[MemberRow]:
        """Return the rows of a batch, group by group, with the streams that need no pass of the model."""
        advantages = self._advantages(groups, [np.zeros(len(group.completions)) for group in groups])
        return [
            self.row(member, self._advantage_of(member, of_group))
            for group, of_group in zip(groups, advantages, strict=True)
            for member in self.members(group)
        ]

    def row(self, member: Member, advantage: float) -> MemberRow:
        """Return the row of one member."""
        problem = member.group.problem
        plain = make_row(problem.prompt_ids, [*member.expert_tokens, *member.sampled_tokens], {"advantage": advantage})
        row = MemberRow(plain.tokens, plain.weights, plain.streams, member=member)
        first_sampled = len(row) - len(member.sampled_tokens)
        if self.options.needs_expert:
            row.streams["expert"] = np.zeros(len(row), np.float32)
            row.streams["expert"][len(problem.prompt_ids) : first_sampled] = 1
        if self.corrects or member.group.completions[0].logprobs is not None:
            row.streams["rollout_logprob"] = np.full(len(row), np.nan, np.float32)
            if isinstance(member, RolloutMember) and member.sampled_tokens:
                row.streams["rollout_logprob"][first_sampled:] = self._rollout_logprobs(member)
        return row

    def _advantages(self, groups: Sequence[Group], penalties: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Return one array per group, the expert's advantage last; penalties are subtracted from the rewards."""
        rewards = []
        for group, penalty in zip(groups, penalties, strict=True):
            overlong = overlong_share(np.array(group.response_lengths), self.max_response, self.options.overlong_buffer)
            of_rollouts = group.rewards - (penalty + self.options.overlong_weight * overlong)
            rewards.append(np.concatenate([of_rollouts, [EXPERT_REWARD] if self.options.expert_in_group else []]))
        return self.batch_advantages(rewards)

    def _advantage_of(self, member: Member, of_group: np.ndarray) -> float:
        if isinstance(member, RolloutMember):
            return of_group[member.index]
        return of_group[-1] if self.options.expert_in_group else 0.0

    def _rollout_logprobs(self, member: RolloutMember) -> list[float]:
        """Return the engine's log-probs of a rollout, which must be finite: NaN marks tokens it did not sample."""
        logprobs = member.completion.logprobs
        if logprobs is not None and np.isfinite(logprobs).all():
            return logprobs
        fault = "no log-probs" if logprobs is None else "a log-prob that is not a finite number"
        reader = "the metrics mismatch/* need"
        if self.corrects:
            reader = f"rl.algorithm.is_correction = {self.options.is_correction} needs"
        raise ValueError(
            f"{member.group.problem.id}: the rollout engine returned {fault} for rollout {member.index} of this "
            f"prompt. {reader} a finite log-prob of every sampled token"
        )

    # ---- after the pass without gradients --------------------------------------------------------------------------

    @property
    def streams_from_pass(self) -> frozenset[str]:
        """Which of old_logprob, ref_logprob and entropy `finish` or `loss` need."""
        return self.options.streams_from_pass(self.rl.updates)

    def finish(self, rows: list[MemberRow]) -> list[MemberRow]:
        """Return the rows with the streams that need whole responses and the streams of the pass."""
        if self.options.kl_in_reward:
            rows = self._subtract_kl_from_rewards(rows)
        if self.options.is_correction == "sequence":
            rows = [with_sequence_weight(row, self.options.is_cap) for row in rows]
        return rows

    def _subtract_kl_from_rewards(self, rows: list[MemberRow]) -> list[MemberRow]:
        """Set the advantages to those of reward - kl_coef k1, k1 = sum over sampled tokens of log pi_old/pi_ref."""
        penalties = {row.member.group: np.zeros(len(row.member.group.completions)) for row in rows}
        for row in rows:
            if isinstance(row.member, RolloutMember):
                k1 = (row.streams["old_logprob"] - row.streams["ref_logprob"])[row.sampled]
                penalties[row.member.group][row.member.index] = self.options.kl_coef * k1.sum(dtype=np.float64)
        groups = list(penalties)
        advantages = dict(zip(groups, self._advantages(groups, list(penalties.values())), strict=True))
        return [
            row.with_streams({"advantage": float(self._advantage_of(row.member, advantages[row.member.group]))})
            for row in rows
        ]

    # ---- after the update ------------------------------------------------------------------------------------------

    def report(self, metrics: dict[str, float]) -> dict[str, float]:
        """Return an update's metrics with ratios and weights as means over the sampled tokens.

        They are omitted if no token was sampled, that is, if only expert rows were trained on.
        """
        sampled_share = 1 - metrics.get("expert", 0.0)
        if sampled_share <= 0:
            return {name: value for name, value in metrics.items() if name not in METRICS_OF_SAMPLED}
        return {name: value / sampled_share if name in METRICS_OF_SAMPLED else value for name, value in metrics.items()}

    @property
    def corrects(self) -> bool:
        """True if sampled tokens are weighted by the learner's probability over the engine's."""
        return self.options.is_correction in ("token", "sequence")


def overlong_share(lengths: np.ndarray, max_response: int, buffer: int) -> np.ndarray:
    """Return DAPO's soft overlong punishment (arXiv 2503.14476, equation 13) for response lengths [n], in tokens.

    It is 0 up to max_response - buffer and rises linearly to 1 at max_response. Without a buffer it is 0.
    """
    return np.clip((lengths - (max_response - buffer)) / buffer, 0, 1) if buffer else np.zeros(len(lengths))


def with_sequence_weight(row: MemberRow, cap: float) -> MemberRow:
    """Add `is_weight`: min(pi_old / pi_rollout of the whole response, cap) on sampled tokens, 1 on the others."""
    log_ratios = row.streams["old_logprob"][row.sampled] - row.streams["rollout_logprob"][row.sampled]
    log_ratio = log_ratios.sum(dtype=np.float64)
    weight = np.float32(np.exp(min(log_ratio, np.log(cap))))
    return row.with_streams({"is_weight": np.where(row.sampled, weight, np.float32(1))})
