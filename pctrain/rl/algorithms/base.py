"""What all algorithms share: which rows a batch has, their per-token streams, and the clipped surrogate.

A row is a rollout, prompt + prefix + completion, or the expert's trajectory. Its streams, all float32 [L]:

    advantage        of the whole response, spread over its tokens
    expert           1 where an expert wrote the token (algorithms that need one)
    rollout_logprob  as the engine computed it; NaN where it sampled nothing
    old_logprob, ref_logprob, entropy   from a pass without gradients, before `finish`
    is_weight        weight of a whole response (rl.is_correction=sequence), made by `finish`
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

import numpy as np
import torch

from pctrain.config.tree import RLConfig
from pctrain.data.problems import Problem
from pctrain.data.rows import Row, make_row
from pctrain.rl.algorithms import policy

if TYPE_CHECKING:
    from pctrain.rl.sampling import Group

EXPERT_REWARD = 1.0  # a trajectory of the training set is taken to be right


@dataclass(frozen=True)
class Member:
    """A row of the batch: rollout `index` of group `group`; None: the trajectory of its expert."""

    group: int
    index: int | None


@dataclass(frozen=True)
class Algorithm:
    """Options of the run; `max_response` in tokens. The class variables say what an algorithm is, and the paper's settings for it."""

    rl: RLConfig
    max_response: int

    dynamic_sampling: ClassVar[bool] = False
    needs_expert: ClassVar[bool] = False  # every problem must carry a trajectory
    expert_in_group: ClassVar[bool] = (
        False  # the expert is the last member of its group: its reward counts in the others' advantages
    )
    paper_std: ClassVar[bool] = False
    paper_entropy_coef: ClassVar[float] = 0.001

    def prefixes(self, problem: Problem, step: int, total_steps: int, seed: int) -> list[list[int]]:
        """Expert tokens that each rollout of this prompt continues, one list a rollout; [] for a plain one. A function of its arguments."""
        return [[] for _ in range(self.rl.group - self.expert_in_group)]

    # ---- rows ------------------------------------------------------------------------------------------------------

    def members(self, groups: Sequence[Group]) -> list[Member]:
        """What each row of `rows(groups)` is."""
        return [
            Member(i, k)
            for i, group in enumerate(groups)
            for k in [*range(len(group.completions)), *([None] if self.expert_in_group else [])]
        ]

    def rows(self, groups: Sequence[Group]) -> list[Row]:
        advantages = self.advantages(groups, [np.zeros(len(group.completions)) for group in groups])
        return [self._row(groups[m.group], m, self._advantage(m, advantages)) for m in self.members(groups)]

    def advantages(self, groups: Sequence[Group], penalties: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Of each group float64 [rollouts], and the expert's behind them where it is a member. `penalties` are taken off the rewards."""
        found = []
        for group, penalty in zip(groups, penalties, strict=True):
            lengths = np.array(
                [len(p) + len(c.token_ids) for p, c in zip(group.prefixes, group.completions, strict=True)]
            )
            penalty = penalty + self.rl.overlong_weight * policy.overlong_share(
                lengths, self.max_response, self.rl.overlong_buffer
            )
            rewards = np.concatenate([group.rewards - penalty, [EXPERT_REWARD] if self.expert_in_group else []])
            std = self.paper_std if self.rl.std_normalise is None else self.rl.std_normalise
            found.append(policy.group_advantages(rewards, std, self.rl.leave_one_out))
        return found

    def _advantage(self, member: Member, advantages: Sequence[np.ndarray]) -> float:
        return advantages[member.group][-1 if member.index is None else member.index]

    def _row(self, group: Group, member: Member, advantage: float) -> Row:
        problem, of_expert = group.problem, member.index is None
        prefix = problem.expert_ids if of_expert else group.prefixes[member.index]
        sampled = [] if of_expert else group.completions[member.index].token_ids
        row = make_row(problem.prompt_ids, [*prefix, *sampled], {"advantage": advantage})
        if self.needs_expert:
            row.streams["expert"] = np.zeros(len(row), np.float32)
            row.streams["expert"][len(problem.prompt_ids) : len(row) - len(sampled)] = 1
        if self.corrects or group.completions[0].logprobs is not None:
            row.streams["rollout_logprob"] = np.full(len(row), np.nan, np.float32)
            if sampled:
                row.streams["rollout_logprob"][-len(sampled) :] = policy.finite(
                    group.completions[member.index].logprobs, problem.id
                )
        return row

    # ---- after the pass without gradients ------------------------------------------------------------------------------

    @property
    def streams_from_pass(self) -> frozenset[str]:
        """Of old_logprob, ref_logprob and entropy what `finish` or `loss` needs."""
        k1 = self.rl.kl_coef > 0 and self.rl.kl_kind == "k1"
        old = self.rl.updates > 1 or self.rl.is_correction == "sequence" or k1
        return frozenset({"old_logprob"} if old else ()) | frozenset({"ref_logprob"} if self.rl.kl_coef else ())

    def finish(self, rows: list[Row], groups: Sequence[Group]) -> list[Row]:
        """Adds what needs whole responses; `rows` are those of `rows(groups)` with the streams of the pass."""
        if self.rl.kl_coef and self.rl.kl_kind == "k1":
            rows = self._kl_in_reward(rows, groups)
        if self.rl.is_correction == "sequence":
            rows = [policy.with_sequence_weight(row, self.rl.is_cap) for row in rows]
        return rows

    def _kl_in_reward(self, rows: list[Row], groups: Sequence[Group]) -> list[Row]:
        """The advantages of the rewards less kl_coef x k1, k1 = sum over what was sampled of old_logprob - ref_logprob."""
        members, penalties = self.members(groups), [np.zeros(len(group.completions)) for group in groups]
        for member, row in zip(members, rows, strict=True):
            if member.index is not None:
                k1 = (row.streams["old_logprob"] - row.streams["ref_logprob"])[policy.sampled(row)]
                penalties[member.group][member.index] = self.rl.kl_coef * k1.sum(dtype=np.float64)
        advantages = self.advantages(groups, penalties)
        return [
            replace(
                row,
                streams={
                    **row.streams,
                    "advantage": np.full(len(row), self._advantage(member, advantages), np.float32),
                },
            )
            for member, row in zip(members, rows, strict=True)
        ]

    # ---- loss ------------------------------------------------------------------------------------------------------

    def loss(self, logprob: torch.Tensor, entropy: torch.Tensor, streams: dict[str, torch.Tensor]):
        """logprob [n], entropy [n], streams {name: [n]} -> (loss [n], metrics {name: [n]}), each of its own token alone."""
        return self.surrogate(logprob, entropy, streams, clip_low=self.rl.clip_low, clip_high=self.rl.clip_low)

    def surrogate(
        self,
        logprob,
        entropy,
        streams,
        *,
        clip_low: float | None,
        clip_high: float | None,
        shaping: float | None = None,
    ):
        rl = self.rl
        return policy.surrogate_loss(
            logprob, entropy, streams, clip_low=clip_low, clip_high=clip_high, dual_clip=rl.dual_clip,
            kl_coef=0.0 if rl.kl_kind == "k1" else rl.kl_coef, kl_kind="k3" if rl.kl_kind == "k1" else rl.kl_kind,
            entropy_coef=self.entropy_coef, is_cap=rl.is_cap if rl.is_correction == "token" else None, shaping=shaping)  # fmt: skip

    def report(self, metrics: dict[str, float]) -> dict[str, float]:
        """Of `Update.metrics` those of a ratio or a weight as means over what was sampled alone; left out where nothing was."""
        own = 1 - metrics.get("expert", 0.0)
        return {
            name: value / own if name in policy.OF_SAMPLED else value
            for name, value in metrics.items()
            if own > 0 or name not in policy.OF_SAMPLED
        }

    @property
    def corrects(self) -> bool:
        """Whether what was sampled is weighed by learner's over engine's probability."""
        return self.rl.is_correction in ("token", "sequence")

    @property
    def entropy_coef(self) -> float:
        return self.paper_entropy_coef if self.rl.entropy_coef is None else self.rl.entropy_coef
