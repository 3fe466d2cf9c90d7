"""Groups of rollouts with their verdicts, and the rows of the batch that are made of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from pctrain.data.problems import Problem
from pctrain.data.rows import Row
from pctrain.reward import Verdict, cause_counts
from pctrain.reward.verdict import FAULTS
from pctrain.rollout import Completion

SURPLUS = "surplus, prompt carried over"  # a rejection: the batch was already full


@dataclass(eq=False)
class Group:
    """One prompt with its rollouts and their verdicts. Two groups are the same only if they are one object.

    `prefixes` holds the expert tokens that each completion continues; they are not part of the completion.
    `rejection` is the reason why the group is not trained on, or None if it is kept. `advantages` has one value per
    rollout once the batch of the step is made (0 for a rollout that the algorithm does not train on); a rejected group
    has none.
    """

    problem: Problem
    completions: list[Completion]
    verdicts: list[Verdict]
    prefixes: list[list[int]]
    rejection: str | None = None
    advantages: list[float] | None = None

    @property
    def rewards(self) -> list[float]:
        """One reward per rollout."""
        return [verdict.reward for verdict in self.verdicts]

    @property
    def right(self) -> int:
        """The number of right rollouts: those with a reward above one half."""
        return sum(reward > 0.5 for reward in self.rewards)

    @property
    def lengths(self) -> list[int]:
        """Tokens of prompt, prefix and completion together, per rollout."""
        prompt = len(self.problem.prompt_ids)
        return [prompt + response for response in self.response_lengths]

    @property
    def response_lengths(self) -> list[int]:
        """Tokens of prefix and completion together, per rollout."""
        return [
            len(prefix) + len(completion.token_ids)
            for prefix, completion in zip(self.prefixes, self.completions, strict=True)
        ]


@dataclass(frozen=True)
class RolloutMember:
    """A row of the batch that is rollout `index` of its group."""

    group: Group
    index: int
    is_expert = False

    @property
    def completion(self) -> Completion:
        """The rollout."""
        return self.group.completions[self.index]

    @property
    def expert_tokens(self) -> list[int]:
        """Tokens of the response that an expert wrote: the prefix."""
        return self.group.prefixes[self.index]

    @property
    def sampled_tokens(self) -> list[int]:
        """Tokens of the response that the policy sampled."""
        return self.completion.token_ids

    @property
    def truncated(self) -> bool:
        """True if the length limit cut the response."""
        return self.completion.finish == "length"


@dataclass(frozen=True)
class ExpertMember:
    """A row of the batch that is the expert's trajectory for the prompt of its group."""

    group: Group
    is_expert = True
    truncated = False

    @property
    def expert_tokens(self) -> list[int]:
        """Tokens of the response that an expert wrote: all of them."""
        return self.group.problem.expert_ids

    @property
    def sampled_tokens(self) -> list[int]:
        """Tokens of the response that the policy sampled: none."""
        return []


Member = RolloutMember | ExpertMember


@dataclass(frozen=True)
class MemberRow(Row):
    """A row of an RL batch that knows which member of which group it is."""

    member: Member = field(kw_only=True)

    @property
    def sampled(self) -> np.ndarray:
        """bool [L]: the tokens that the policy sampled and that are trained on."""
        return (self.weights > 0) & (self.streams.get("expert", 0) == 0)

    def with_streams(self, streams: Mapping[str, np.ndarray | float]) -> MemberRow:
        """Return the row with more streams, each an array [L] or one value for all tokens."""
        arrays = {
            name: value if isinstance(value, np.ndarray) else np.full(len(self), value, np.float32)
            for name, value in streams.items()
        }
        return replace(self, streams={**self.streams, **arrays})


@dataclass
class Sampled:
    """Everything one step sampled: the kept groups first, then the rejected ones."""

    groups: list[Group] = field(default_factory=list)
    rounds: int = 0
    rollout_seconds: float = 0.0
    reward_seconds: float = 0.0

    @property
    def kept(self) -> list[Group]:
        """The groups to train on."""
        return [group for group in self.groups if group.rejection is None]

    @property
    def rejected(self) -> list[Group]:
        """The groups that are not trained on."""
        return [group for group in self.groups if group.rejection is not None]

    @property
    def completions(self) -> list[Completion]:
        """All rollouts, in the order of the groups."""
        return [completion for group in self.groups for completion in group.completions]

    @property
    def verdicts(self) -> list[Verdict]:
        """The verdicts on all rollouts, in the same order."""
        return [verdict for group in self.groups for verdict in group.verdicts]

    @property
    def tokens(self) -> int:
        """The number of sampled tokens."""
        return sum(len(completion.token_ids) for completion in self.completions)

    @property
    def mean_reward(self) -> float:
        """The mean reward over all rollouts."""
        return float(np.mean([verdict.reward for verdict in self.verdicts]))

    def metrics(self) -> dict[str, float]:
        """Return metrics over all rollouts, rejected groups included: they describe the policy, not the batch."""
        return {
            "reward": self.mean_reward,
            "response_length": float(np.mean([len(c.token_ids) for c in self.completions])),
            "truncated_share": float(np.mean([c.finish == "length" for c in self.completions])),
            "no_box_share": float(np.mean([verdict.cause == "no_box" for verdict in self.verdicts])),
            "verifier_faults": sum(verdict.cause in FAULTS for verdict in self.verdicts),
            **cause_counts(self.verdicts),
            "rounds": self.rounds,
            "kept_prompts": len(self.kept),
            "dropped_prompts": sum(group.rejection != SURPLUS for group in self.rejected),
            "carried_prompts": sum(group.rejection == SURPLUS for group in self.rejected),
        }

    def shortage(self, wanted: int) -> str | None:
        """Return a sentence on why fewer than `wanted` prompts were kept, or None if the batch is full."""
        if len(self.kept) >= wanted:
            return None
        reasons = Counter(str(group.rejection) for group in self.rejected).most_common()
        listed = ", ".join(f"{count} {reason}" for reason, count in reasons) or "no group was rejected"
        return f"only {len(self.kept)} of {wanted} prompts were kept in {self.rounds} rounds ({listed})"


def lengths_of(groups: Sequence[Group]) -> list[int]:
    """Return the tokens of every rollout of `groups`, prompt included."""
    return [length for group in groups for length in group.lengths]
