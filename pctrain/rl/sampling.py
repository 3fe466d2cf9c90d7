"""Groups of rollouts with their rewards: one round, or as many as dynamic sampling needs."""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import dataclass, field

import numpy as np

from pctrain.common.errors import UserError
from pctrain.config.tree import Config
from pctrain.data.problems import Problem
from pctrain.data.sampler import ShuffledSampler
from pctrain.distributed import parallel
from pctrain.distributed.health import watchdog
from pctrain.hf.tokenizer import Tokenizer
from pctrain.reward import Verdict, VerifierPool, cause_counts
from pctrain.reward.verdict import FAULTS, TRUNCATED
from pctrain.rl.algorithms.base import Algorithm
from pctrain.rollout import Completion, Request, RolloutEngine, sampling_seed

SURPLUS = "surplus, prompt carried over"


@dataclass(frozen=True)
class Group:
    """One prompt, its rollouts and their verdicts."""

    problem: Problem
    completions: list[Completion]
    verdicts: list[Verdict]
    prefixes: list[list[int]]  # expert tokens that each completion continues; not among its own

    @property
    def rewards(self) -> list[float]:
        return [verdict.reward for verdict in self.verdicts]

    @property
    def right(self) -> int:
        """How many rollouts are right (a reward above one half)."""
        return sum(reward > 0.5 for reward in self.rewards)

    @property
    def lengths(self) -> list[int]:
        """Of every rollout: prompt, prefix and completion, tokens."""
        parts = zip(self.prefixes, self.completions, strict=True)
        return [len(self.problem.prompt_ids) + len(prefix) + len(c.token_ids) for prefix, c in parts]


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
        """UserError where it is of another, larger set of problems."""
        if max(state["carried"], default=0) >= len(self.problems):
            raise UserError(
                f"the saved state carries problem {max(state['carried'])}, but data.rl has {len(self.problems)}; it is of "
                "another set: name that one"
            )
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

    def __init__(
        self, config: Config, engine: RolloutEngine, verifier: VerifierPool, tokenizer: Tokenizer, algorithm: Algorithm
    ):
        self.config, self.engine, self.verifier, self.tokenizer, self.algorithm = (
            config,
            engine,
            verifier,
            tokenizer,
            algorithm,
        )

    @watchdog.phase("rollout")
    def sample(self, prompts: PromptStream, step: int) -> Sampled:
        """`rl.prompts` groups; under dynamic sampling such as the window keeps, in at most `rl.max_rounds` rounds of `rl.round_prompts`.

        A group within the window (`rl.keep_low` to `rl.keep_high` right rollouts) but more than the batch holds is dropped (its rollouts
        belong to this policy, not the next one) and its prompt is carried over to the next step. Where the rounds run out the batch is
        smaller, possibly empty.
        """
        rl, out = self.config.rl, Sampled()
        if not self.algorithm.dynamic_sampling:
            out.kept = self._round(prompts.take(rl.prompts), step, out)
            return out
        surplus: list[Group] = []
        while len(out.kept) < rl.prompts and out.rounds < rl.max_rounds:
            for group in self._round(prompts.take(rl.round_prompts), step, out):
                reason = self._outside(group)
                if reason is not None:
                    out.dropped.append((group, reason))
                elif len(out.kept) < rl.prompts:
                    out.kept.append(group)
                else:
                    surplus.append(group)
        out.dropped += [(group, SURPLUS) for group in surplus]
        prompts.carry([group.problem for group in surplus])
        return out

    def _outside(self, group: Group) -> str | None:
        """Why the window does not keep a group; None where it does."""
        rl, size = self.config.rl, len(group.completions)
        high = size - 1 if rl.keep_high is None else rl.keep_high
        if rl.keep_low <= group.right <= high:
            return None
        return {0: "all wrong", size: "all right"}.get(group.right, f"{group.right} of {size} right")

    def _round(self, problems: list[Problem], step: int, out: Sampled) -> list[Group]:
        rl, rollout, seed = self.config.rl, self.config.rollout, self.config.run.seed
        began = time.perf_counter()
        requests, prefixes = [], []
        for problem in problems:
            of_problem = self.algorithm.prefixes(problem, step, rl.steps, seed)
            # A small prompt set may bring a problem again within one step: its second group must not repeat the first.
            first = out.sampled_before[problem.index] * len(of_problem)
            out.sampled_before[problem.index] += 1
            for k, prefix in enumerate(of_problem):
                key = sampling_seed(seed, "rollout", step, problem.index, first + k)
                requests.append(
                    Request([*problem.prompt_ids, *prefix], key, max_response=rollout.max_response - len(prefix))
                )
            prefixes.append(of_problem)
        # The log-probs tell in every step how far engine and learner are apart (rl/mismatch.py).
        completions = self.engine.generate(
            requests, temperature=rollout.temperature, max_response=rollout.max_response, logprobs=True
        )
        sampled_at = time.perf_counter()
        verdicts = self._verdicts(problems, prefixes, completions)
        out.rounds += 1
        out.rollout_seconds += sampled_at - began
        out.reward_seconds += time.perf_counter() - sampled_at
        groups, at = [], 0
        for problem, of_problem in zip(problems, prefixes, strict=True):
            part = slice(at, at := at + len(of_problem))
            groups.append(Group(problem, completions[part], verdicts[part], of_problem))
        return groups

    @watchdog.phase("reward")
    def _verdicts(
        self, problems: list[Problem], prefixes: list[list[list[int]]], completions: list[Completion]
    ) -> list[Verdict]:
        """Of each completion behind its prefix; a response that was cut is wrong, unless `rl.truncated` is masked."""
        owners = [
            (problem, prefix) for problem, of_problem in zip(problems, prefixes, strict=True) for prefix in of_problem
        ]
        judged = [i for i, c in enumerate(completions) if c.finish == "stop" or self.config.rl.truncated == "masked"]
        items = [
            (self.tokenizer.decode([*owners[i][1], *completions[i].token_ids]), owners[i][0].answer) for i in judged
        ]
        verdicts = [TRUNCATED] * len(completions)
        for i, verdict in zip(judged, parallel.map_over_ranks(self.verifier.score, items), strict=True):
            verdicts[i] = verdict
        return verdicts


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
        "dropped_prompts": sum(why != SURPLUS for _, why in sampled.dropped),
        "carried_prompts": sum(why == SURPLUS for _, why in sampled.dropped),
    }
