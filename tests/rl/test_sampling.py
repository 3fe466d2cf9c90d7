"""Dynamic sampling: full batches of informative prompts, a cap, a carry-over, and a reason for every rejected group."""

import json
from dataclasses import asdict
from types import SimpleNamespace

import numpy as np
import pytest

from pctrain.common.errors import UserError
from pctrain.config.tree import Config
from pctrain.data.problems import Problem
from pctrain.reward import Verdict
from pctrain.rl import replay
from pctrain.rl.prompts import PromptStream
from pctrain.rl.sampling import GroupSampler
from pctrain.rollout import Completion

PROBLEMS = [Problem(f"p{i}", i, f"{i}=", [3, 4], str(i)) for i in range(40)]
GROUP = 4


class Worker:
    """Rollout worker that answers with the number of the request, so that its verifier can decide by prompt."""

    def __init__(self, finish=("stop",), verifier=None):
        self.seeds, self.requests, self.finish = [], [], finish
        self.verifier = verifier or Verifier()

    def score(self, responses):
        return self.verifier.score([(str(ids[-1]), answer) for ids, answer in responses])

    def sleep(self):
        pass

    def generate(self, requests):
        self.seeds += [request.seed for request in requests]
        self.requests += requests
        return [Completion([5, i], self.finish[i % len(self.finish)], [-0.5, -0.25]) for i, _ in enumerate(requests)]


class Algorithm:
    """Return a stream of groups; `prefix` are expert tokens that the last rollout of a prompt continues."""

    def __init__(self, dynamic, group=GROUP, prefix=()):
        self.options = SimpleNamespace(dynamic_sampling=dynamic)
        self.group, self.prefix = group, list(prefix)

    def prefixes(self, problem, step, total_steps, seed):
        return [[] for _ in range(self.group - 1)] + [self.prefix]


class Verifier:
    """Reward problem i: mixed rewards if i is a multiple of 3, else all right or all wrong."""

    def score(self, items):
        rewards = []
        for text, answer in items:
            i = int(answer)
            rewards.append(float(int(text) % 2) if i % 3 == 0 else float(i % 3 == 1))
        return [Verdict(r, "right" if r else "wrong") for r in rewards]


def sampler(dynamic=True, worker=None, prefix=(), **rl):
    config = Config()
    for key, value in ({"group": GROUP, "prompts": 4, "round_prompts": 8, "max_rounds": 10} | rl).items():
        setattr(config.rl, key, value)
    max_response = config.rollout.max_response
    algorithm = Algorithm(dynamic, prefix=prefix)
    return GroupSampler(worker or Worker(), algorithm, config.rl, max_response=max_response, seed=config.run.seed)


def mixed(group):
    return 0 < group.right < GROUP


def test_a_batch_is_full_and_informative():
    stream, groups = PromptStream(PROBLEMS, seed=1), sampler()
    for step in range(1, 6):
        sampled = groups.sample_groups(stream, step)
        assert len(sampled.kept) == 4
        assert all(mixed(group) and group.problem.index % 3 == 0 for group in sampled.kept)
        for group in sampled.rejected:
            expected = {0: "surplus, prompt carried over", 1: "all right", 2: "all wrong"}[group.problem.index % 3]
            assert group.rejection == expected
        assert len(sampled.groups) == 8 * sampled.rounds  # every group that was sampled is accounted for


def test_surplus_prompts_come_first_in_the_next_step():
    stream, groups = PromptStream(PROBLEMS, seed=1), sampler(prompts=1)
    first = groups.sample_groups(stream, 1)
    carried = [group.problem.index for group in first.rejected if "carried" in group.rejection]
    assert carried and stream.carried == carried
    second = groups.sample_groups(stream, 2)
    assert [group.problem.index for group in second.groups][:1] == carried[:1]
    assert second.kept[0].problem.index == carried[0]


def test_the_rounds_are_capped():
    stream = PromptStream([p for p in PROBLEMS if p.index % 3 == 1], seed=1)
    sampled = sampler(max_rounds=3).sample_groups(stream, 1)
    assert sampled.kept == [] and sampled.rounds == 3 and len(sampled.rejected) == 24
    assert sampled.metrics()["reward"] == 1.0 and sampled.metrics()["dropped_prompts"] == 24


def test_every_request_has_its_own_seed():
    groups = sampler(prompts=8)
    stream = PromptStream(PROBLEMS[:5], seed=1)  # the set starts again within a step
    groups.sample_groups(stream, 1)
    groups.sample_groups(stream, 2)
    seeds = groups.worker.seeds
    assert len(set(seeds)) == len(seeds)
    repeated = sampler(prompts=8)
    again = PromptStream(PROBLEMS[:5], seed=1)
    repeated.sample_groups(again, 1)
    assert repeated.worker.seeds == seeds[: len(repeated.worker.seeds)]


def test_without_dynamic_sampling_every_prompt_is_kept():
    sampled = sampler(dynamic=False).sample_groups(PromptStream(PROBLEMS, seed=1), 1)
    assert len(sampled.kept) == 4 and not sampled.rejected and sampled.rounds == 1


def test_a_restored_stream_continues_where_it_was():
    whole, halves = PromptStream(PROBLEMS, seed=7), PromptStream(PROBLEMS, seed=7)
    halves.take(13)
    halves.carry(PROBLEMS[2:4])
    restored = PromptStream(PROBLEMS, seed=7)
    restored.load_state_dict(halves.state_dict())
    whole.take(13)
    assert [p.index for p in restored.take(6)] == [2, 3] + [p.index for p in whole.take(4)]


@pytest.mark.parametrize("dynamic", [True, False])
def test_sampling_again_gives_the_same(dynamic):
    results = [sampler(dynamic).sample_groups(PromptStream(PROBLEMS, seed=3), 5) for _ in range(2)]
    assert [g.problem.index for g in results[0].kept] == [g.problem.index for g in results[1].kept]


class Half:
    """Reward problem i: i % 5 of the four rollouts are right."""

    def score(self, items):
        return [Verdict(float(int(text) % GROUP < int(answer) % 5), "right") for text, answer in items]


def test_groups_are_selected_by_the_number_of_right_rollouts():
    sampled = sampler(worker=Worker(verifier=Half()), keep_low=2, keep_high=3, max_rounds=2, prompts=8).sample_groups(
        PromptStream(PROBLEMS, seed=1), 1
    )
    assert sampled.kept and {group.right for group in sampled.kept} == {2, 3}
    whys = {group.right: group.rejection for group in sampled.rejected if "carried" not in group.rejection}
    assert whys == {0: "all wrong", 1: "1 of 4 right", 4: "all right"}


def test_a_response_that_was_cut_is_wrong_or_judged():
    """Every second response is truncated; in problems 3 and 6 every second response is right."""
    right = {}
    for truncated in ("wrong", "masked"):
        groups = sampler(dynamic=False, worker=Worker(("stop", "length")), truncated=truncated, prompts=2)
        sampled = groups.sample_groups(PromptStream([PROBLEMS[0], PROBLEMS[3]], seed=1), 1)
        right[truncated] = [group.right for group in sampled.groups]
        assert sampled.metrics()["truncated_share"] == 0.5
        causes = {verdict.cause for group in sampled.groups for verdict in group.verdicts}
        assert ("truncated" in causes) == (truncated == "wrong")
    assert right == {"wrong": [0, 0], "masked": [2, 2]}


def test_a_rollout_that_continues_a_prefix():
    worker, prefix = Worker(), [7, 8, 9]
    groups = sampler(dynamic=False, worker=worker, prefix=prefix, prompts=2)
    sampled = groups.sample_groups(PromptStream(PROBLEMS, seed=1), 1)
    longest = groups.max_response
    for i, request in enumerate(worker.requests):
        last = i % GROUP == GROUP - 1
        assert list(request.prompt_ids) == [3, 4] + prefix * last and request.max_response == longest - 3 * last
    group = sampled.groups[0]
    assert group.prefixes == [[], [], [], prefix] and sum(group.lengths) == GROUP * (2 + 2) + 3


# ---- rollouts on disk ----


def test_rollouts_come_back_from_the_disk_bit_for_bit(tmp_path):
    stream, groups = PromptStream(PROBLEMS, seed=1), sampler(prefix=[7])
    sampled = groups.sample_groups(stream, 3)
    path = replay.path_of(tmp_path, 3)
    replay.save(path, 3, sampled, stream.state_dict())
    step, again, state = replay.load(path, PROBLEMS)
    assert step == 3 and state == stream.state_dict() and sampled.rejected
    assert asdict(again) == asdict(sampled)


def test_rollouts_of_other_problems_and_damaged_files(tmp_path):
    stream, path = PromptStream(PROBLEMS, seed=1), tmp_path / "step-1.replay.npz"
    replay.save(path, 1, sampler().sample_groups(stream, 1), stream.state_dict())
    with pytest.raises(UserError, match=r"is not number .* of data.rl"):
        replay.load(path, PROBLEMS[::-1])
    with pytest.raises(UserError, match="does not exist"):
        replay.load(tmp_path / "none.npz", PROBLEMS)
    for content in (b"", b"no archive", path.read_bytes()[:200]):
        path.write_bytes(content)
        with pytest.raises(UserError, match="holds no rollouts"):
            replay.load(path, PROBLEMS)


def test_rollouts_that_do_not_fit_each_other(tmp_path):
    """Cases found by fuzzing: tokens belonged to another rollout, or the error came later and did not name the file."""
    stream, path = PromptStream(PROBLEMS, seed=1), tmp_path / "step-1.replay.npz"
    replay.save(path, 1, sampler().sample_groups(stream, 1), stream.state_dict())
    with np.load(path) as archive:
        arrays = dict(archive)
    about = json.loads(arrays["about"].tobytes())
    groups = about["groups"]
    spoilt = [
        {"lengths": arrays["lengths"] + 1},
        {"lengths": arrays["lengths"].astype(float)},
        {"tokens": arrays["tokens"][:-1]},
        {"about": 3},
        {"about": []},
        {"about": about | {"groups": [{}]}},
        {"about": about | {"groups": groups[:-1]}},
        {"about": about | {"groups": [groups[0] | {"prefixes": []}, *groups[1:]]}},
        {"about": about | {"step": "1"}},
        {"about": about | {"groups": [groups[0] | {"problem": -1}, *groups[1:]]}},
        {"about": about | {"rollout_seconds": None}},
    ]
    for changed in spoilt:
        if "about" in changed:
            changed = {"about": np.frombuffer(json.dumps(changed["about"]).encode(), np.uint8)}
        np.savez(path, **arrays | changed)
        with pytest.raises(UserError, match=f"{path} holds no rollouts of a step"):
            replay.load(path, PROBLEMS)
    with pytest.raises(UserError, match="carries problem 1000000"):
        stream.load_state_dict({"position": 0, "carried": [10**6]})


def test_rollouts_covered_by_a_checkpoint_are_deleted(tmp_path):
    for step in (1, 2, 10):
        replay.path_of(tmp_path, step).parent.mkdir(exist_ok=True)
        replay.path_of(tmp_path, step).write_bytes(b"")
    replay.delete_covered(tmp_path, None)
    assert len(list((tmp_path / "rollouts").iterdir())) == 3
    replay.delete_covered(tmp_path, tmp_path / "checkpoints" / "step-2")
    assert [path.name for path in (tmp_path / "rollouts").iterdir()] == ["step-10.replay.npz"]
