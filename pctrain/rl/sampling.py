"""Sampling the groups of a step: generate, score, select; one round, or as many as dynamic sampling needs."""

from __future__ import annotations

import time
from collections import Counter

from pctrain.config.tree import RLConfig
from pctrain.data.problems import Problem
from pctrain.distributed.health import watchdog
from pctrain.reward import Verdict
from pctrain.reward.verdict import TRUNCATED
from pctrain.rl.algorithms.base import Algorithm
from pctrain.rl.groups import SURPLUS, Group, Sampled
from pctrain.rl.prompts import PromptStream
from pctrain.rollout import Completion, Request, sampling_seed
from pctrain.rollout.worker import RolloutWorker


class GroupSampler:
    """Samples the groups of each step from the weights that the rollout worker holds."""

    def __init__(self, worker: RolloutWorker, algorithm: Algorithm, rl: RLConfig, *, max_response: int, seed: int):
        self.worker = worker
        self.algorithm = algorithm
        self.rl = rl
        self.max_response = max_response
        self.seed = seed

    @watchdog.phase("rollout")
    def sample_groups(self, prompts: PromptStream, step: int) -> Sampled:
        """Return `rl.prompts` groups and those that were rejected. Collective.

        Without dynamic sampling every group of one sampling round is kept. With it, sampling rounds of
        `rl.round_prompts` prompts follow each other, at most `rl.max_rounds`, until the batch has `rl.prompts` groups
        with `rl.keep_low` to `rl.keep_high` right rollouts. If the rounds run out, the batch is smaller or even empty.
        """
        sampled = Sampled()
        if self.algorithm.options.dynamic_sampling:
            self._sample_until_full(prompts, step, sampled)
        else:
            sampled.groups = self._sample_round(prompts.take(self.rl.prompts), step, sampled, Counter())
        self.worker.sleep()
        return sampled

    def _sample_until_full(self, prompts: PromptStream, step: int, sampled: Sampled) -> None:
        rl = self.rl
        kept: list[Group] = []
        rejected: list[Group] = []
        surplus: list[Group] = []
        sampled_before: Counter[int] = Counter()  # groups of this step, by problem
        while len(kept) < rl.prompts and sampled.rounds < rl.max_rounds:
            for group in self._sample_round(prompts.take(rl.round_prompts), step, sampled, sampled_before):
                group.rejection = self._rejection(group)
                if group.rejection is not None:
                    rejected.append(group)
                elif len(kept) < rl.prompts:
                    kept.append(group)
                else:
                    # Its rollouts belong to this policy, not to the next one: only the prompt is kept.
                    group.rejection = SURPLUS
                    surplus.append(group)
        sampled.groups = kept + rejected + surplus
        prompts.carry([group.problem for group in surplus])

    def _rejection(self, group: Group) -> str | None:
        """Return the reason why dynamic sampling rejects the group, or None if it is kept."""
        rl = self.rl
        size = len(group.completions)
        high = size - 1 if rl.keep_high is None else rl.keep_high
        if rl.keep_low <= group.right <= high:
            return None
        if group.right == 0:
            return "all wrong"
        if group.right == size:
            return "all right"
        return f"{group.right} of {size} right"

    def _sample_round(
        self, problems: list[Problem], step: int, sampled: Sampled, sampled_before: Counter[int]
    ) -> list[Group]:
        """Generate and score one group per problem, and add the time it took to `sampled`."""
        began = time.perf_counter()
        prefixes = [self._prefixes(problem, step) for problem in problems]
        requests: list[Request] = []
        for problem, of_problem in zip(problems, prefixes, strict=True):
            # A small prompt set may bring a problem again within one step: its second group must not repeat the first.
            first_sample = sampled_before[problem.index] * len(of_problem)
            sampled_before[problem.index] += 1
            requests += self._requests(problem, of_problem, step, first_sample)
        completions = self.worker.generate(requests)
        generated = time.perf_counter()
        owners = [problem for problem, of_problem in zip(problems, prefixes, strict=True) for _ in of_problem]
        flat_prefixes = [prefix for of_problem in prefixes for prefix in of_problem]
        verdicts = self._score(owners, flat_prefixes, completions)
        sampled.rounds += 1
        sampled.rollout_seconds += generated - began
        sampled.reward_seconds += time.perf_counter() - generated

        groups: list[Group] = []
        start = 0
        for problem, of_problem in zip(problems, prefixes, strict=True):
            end = start + len(of_problem)
            groups.append(Group(problem, completions[start:end], verdicts[start:end], of_problem))
            start = end
        return groups

    def _prefixes(self, problem: Problem, step: int) -> list[list[int]]:
        return self.algorithm.prefixes(problem, step, self.rl.steps, self.seed)

    def _requests(self, problem: Problem, prefixes: list[list[int]], step: int, first_sample: int) -> list[Request]:
        return [
            Request(
                [*problem.prompt_ids, *prefix],
                sampling_seed(self.seed, "rollout", step, problem.index, first_sample + number),
                max_response=self.max_response - len(prefix),
            )
            for number, prefix in enumerate(prefixes)
        ]

    @watchdog.phase("reward")
    def _score(
        self, problems: list[Problem], prefixes: list[list[int]], completions: list[Completion]
    ) -> list[Verdict]:
        """Return one verdict per response (prefix plus completion).

        A truncated response is wrong without being judged, unless `rl.truncated` is "masked".
        """
        judge_truncated = self.rl.truncated == "masked"
        judged = [i for i, c in enumerate(completions) if c.finish == "stop" or judge_truncated]
        responses = [([*prefixes[i], *completions[i].token_ids], problems[i].answer) for i in judged]
        verdicts = [TRUNCATED] * len(completions)
        for i, verdict in zip(judged, self.worker.score(responses), strict=True):
            verdicts[i] = verdict
        return verdicts
