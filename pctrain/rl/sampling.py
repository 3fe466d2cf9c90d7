"""Groups of rollouts with their rewards: one round, or as many as dynamic sampling needs."""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import dataclass, field

import numpy as np

from pctrain.config import Config
from pctrain.core import parallel
from pctrain.data.problems import Problem
from pctrain.data.sampler import ShuffledSampler
from pctrain.data.tokenizer import Tokenizer
from pctrain.reward import Verdict, VerifierPool, cause_counts
from pctrain.reward.verdict import FAULTS
from pctrain.rollout import Completion, Request, RolloutEngine, sampling_seed


@dataclass(frozen=True)
class Group:
    """One prompt, its rollouts and their verdicts."""

    problem: Problem
    completions: list[Completion]
    verdicts: list[Verdict]

    @property
    def rewards(self) -> list[float]:
        return [verdict.reward for verdict in self.verdicts]

    @property
    def informative(self) -> bool:
        """Whether the rewards differ: else every advantage is 0."""
        return len(set(self.rewards)) > 1

    @property
    def tokens(self) -> int:
        return sum(len(self.problem.prompt_ids) + len(c.token_ids) for c in self.completions)


class PromptStream:
    """Problems in a seeded order, epoch after epoch. State: the position, and the prompts carried over from the step before."""

    def __init__(self, problems: list[Problem], seed: int):
        self.problems = problems
        self._order = ShuffledSampler([len(problems)], 1, seed)
        self.position = 0
        self.carried: list[int] = []

    def take(self, count: int) -> list[Problem]:
        """The carried prompts first, then the next ones of the stream."""
        indices, self.carried = self.carried[:count], self.carried[count:]
        while len(indices) < count:
            indices += self._order.indices(self.position)
            self.position += 1
        return [self.problems[i] for i in indices]

    def carry(self, problems: list[Problem]) -> None:
        self.carried += [problem.index for problem in problems]

    def state_dict(self) -> dict:
        return {"position": self.position, "carried": list(self.carried)}

    def load_state_dict(self, state: dict) -> None:
        self.position, self.carried = state["position"], list(state["carried"])


@dataclass
class Sampled:
    """What one step sampled: `kept` is trained on, `dropped` says why each other group is not."""

    kept: list[Group] = field(default_factory=list)
    dropped: list[tuple[Group, str]] = field(default_factory=list)
    rounds: int = 0
    rollout_seconds: float = 0.0
    reward_seconds: float = 0.0
    sampled_before: Counter[int] = field(default_factory=Counter)  # groups so far of each problem

    @property
    def groups(self) -> list[Group]:
        return self.kept + [group for group, _ in self.dropped]


class GroupSampler:
    """Samples the groups of a step from the weights that the engine holds."""

    def __init__(self, config: Config, engine: RolloutEngine, verifier: VerifierPool, tokenizer: Tokenizer, dynamic: bool):
        self.config, self.engine, self.verifier, self.tokenizer, self.dynamic = config, engine, verifier, tokenizer, dynamic

    def sample(self, prompts: PromptStream, step: int) -> Sampled:
        """`rl.prompts` groups; under dynamic sampling informative ones, in at most `rl.max_rounds` rounds of `rl.round_prompts`.

        A group that is informative but more than the batch holds is dropped (its rollouts belong to this policy, not the next one) and
        its prompt is carried over to the next step. Where the rounds run out the batch is smaller, possibly empty.
        """
        rl, out = self.config.rl, Sampled()
        if not self.dynamic:
            out.kept = self._round(prompts.take(rl.prompts), step, out)
            return out
        surplus: list[Group] = []
        while len(out.kept) < rl.prompts and out.rounds < rl.max_rounds:
            for group in self._round(prompts.take(rl.round_prompts), step, out):
                if not group.informative:
                    out.dropped.append((group, "all right" if group.rewards[0] else "all wrong"))
                elif len(out.kept) < rl.prompts:
                    out.kept.append(group)
                else:
                    surplus.append(group)
        out.dropped += [(group, "surplus, prompt carried over") for group in surplus]
        prompts.carry([group.problem for group in surplus])
        return out

    def _round(self, problems: list[Problem], step: int, out: Sampled) -> list[Group]:
        rl, seed = self.config.rl, self.config.run.seed
        began = time.perf_counter()
        requests = []
        for problem in problems:
            # A small prompt set may bring a problem again within one step: its second group must not repeat the first.
            first = out.sampled_before[problem.index] * rl.group
            out.sampled_before[problem.index] += 1
            requests += [
                Request(problem.prompt_ids, sampling_seed(seed, "rollout", step, problem.index, first + k)) for k in range(rl.group)
            ]
        completions = self.engine.generate(
            requests, temperature=self.config.rollout.temperature, max_response=self.config.rollout.max_response
        )
        sampled_at = time.perf_counter()
        answers = [p.answer for p in problems for _ in range(rl.group)]
        items = [(self.tokenizer.decode(c.token_ids), answer) for c, answer in zip(completions, answers, strict=True)]
        verdicts = parallel.map_over_ranks(self.verifier.score, items)
        out.rounds += 1
        out.rollout_seconds += sampled_at - began
        out.reward_seconds += time.perf_counter() - sampled_at
        starts = range(0, len(requests), rl.group)
        return [Group(p, completions[i : i + rl.group], verdicts[i : i + rl.group]) for p, i in zip(problems, starts, strict=True)]


def summary(sampled: Sampled) -> dict[str, float]:
    """Metrics over everything that was sampled, dropped groups included: what the policy does, not what it is trained on."""
    completions = [c for group in sampled.groups for c in group.completions]
    rewards = [r for group in sampled.groups for r in group.rewards]
    verdicts = [v for group in sampled.groups for v in group.verdicts]
    return {
        "reward": float(np.mean(rewards)),
        "response_length": float(np.mean([len(c.token_ids) for c in completions])),
        "truncated_share": float(np.mean([c.finish == "length" for c in completions])),
        "no_box_share": float(np.mean([v.cause == "no_box" for v in verdicts])),
        "verifier_faults": sum(v.cause in FAULTS for v in verdicts),
        **cause_counts(verdicts),
        "rounds": sampled.rounds,
        "kept_prompts": len(sampled.kept),
        "dropped_prompts": sum("carried" not in why for _, why in sampled.dropped),
        "carried_prompts": sum("carried" in why for _, why in sampled.dropped),
    }
