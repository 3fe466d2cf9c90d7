"""Dynamic sampling: full batches of informative prompts, a cap, a carry-over, and nothing lost without a reason."""

import pytest

from pctrain.config import Config
from pctrain.data.problems import Problem
from pctrain.reward import Verdict
from pctrain.rl.sampling import GroupSampler, PromptStream, summary
from pctrain.rollout import Completion

PROBLEMS = [Problem(f"p{i}", i, f"{i}=", [3, 4], str(i)) for i in range(40)]
GROUP = 4


class Engine:
    """Answers with the prompt's index and the seed, so that the verifier below can decide by prompt."""

    def __init__(self):
        self.seeds = []

    def generate(self, requests, *, temperature, max_response):
        self.seeds += [request.seed for request in requests]
        return [Completion([5, 6], "stop", None) for _ in requests]


class Verifier:
    """Problem i: mixed rewards where i is a multiple of 3, else all right or all wrong."""

    def score(self, items):
        rewards = []
        for k, (_, answer) in enumerate(items):
            i = int(answer)
            rewards.append(float(k % 2) if i % 3 == 0 else float(i % 3 == 1))
        return [Verdict(r, "right" if r else "wrong") for r in rewards]


class Tokenizer:
    def decode(self, ids):
        return "text"


def sampler(dynamic=True, **rl):
    config = Config()
    for key, value in ({"group": GROUP, "prompts": 4, "round_prompts": 8, "max_rounds": 10} | rl).items():
        setattr(config.rl, key, value)
    return GroupSampler(config, Engine(), Verifier(), Tokenizer(), dynamic)


def test_a_batch_is_full_and_informative():
    stream, groups = PromptStream(PROBLEMS, seed=1), sampler()
    for step in range(1, 6):
        sampled = groups.sample(stream, step)
        assert len(sampled.kept) == 4
        assert all(group.informative and group.problem.index % 3 == 0 for group in sampled.kept)
        for group, why in sampled.dropped:
            expected = {0: "surplus, prompt carried over", 1: "all right", 2: "all wrong"}[group.problem.index % 3]
            assert why == expected
        assert len(sampled.groups) == 8 * sampled.rounds  # every group that was sampled is accounted for


def test_surplus_prompts_come_first_in_the_next_step():
    stream, groups = PromptStream(PROBLEMS, seed=1), sampler(prompts=1)
    first = groups.sample(stream, 1)
    carried = [group.problem.index for group, why in first.dropped if "carried" in why]
    assert carried and stream.carried == carried
    second = groups.sample(stream, 2)
    assert [group.problem.index for group in second.groups][:1] == carried[:1]
    assert second.kept[0].problem.index == carried[0]


def test_the_rounds_are_capped():
    stream = PromptStream([p for p in PROBLEMS if p.index % 3 == 1], seed=1)
    sampled = sampler(max_rounds=3).sample(stream, 1)
    assert sampled.kept == [] and sampled.rounds == 3 and len(sampled.dropped) == 24
    assert summary(sampled)["reward"] == 1.0 and summary(sampled)["dropped_prompts"] == 24


def test_every_request_has_a_seed_of_its_own():
    groups = sampler(prompts=8)
    stream = PromptStream(PROBLEMS[:5], seed=1)  # the set comes round again within a step
    groups.sample(stream, 1)
    groups.sample(stream, 2)
    seeds = groups.engine.seeds
    assert len(set(seeds)) == len(seeds)
    repeated = sampler(prompts=8)
    again = PromptStream(PROBLEMS[:5], seed=1)
    repeated.sample(again, 1)
    assert repeated.engine.seeds == seeds[: len(repeated.engine.seeds)]


def test_without_dynamic_sampling_every_prompt_is_kept():
    sampled = sampler(dynamic=False).sample(PromptStream(PROBLEMS, seed=1), 1)
    assert len(sampled.kept) == 4 and not sampled.dropped and sampled.rounds == 1


def test_a_restored_stream_goes_on_where_it_was():
    whole, halves = PromptStream(PROBLEMS, seed=7), PromptStream(PROBLEMS, seed=7)
    halves.take(13)
    halves.carry(PROBLEMS[2:4])
    restored = PromptStream(PROBLEMS, seed=7)
    restored.load_state_dict(halves.state_dict())
    whole.take(13)
    assert [p.index for p in restored.take(6)] == [2, 3] + [p.index for p in whole.take(4)]


@pytest.mark.parametrize("dynamic", [True, False])
def test_sampling_again_gives_the_same(dynamic):
    results = [sampler(dynamic).sample(PromptStream(PROBLEMS, seed=3), 5) for _ in range(2)]
    assert [g.problem.index for g in results[0].kept] == [g.problem.index for g in results[1].kept]
