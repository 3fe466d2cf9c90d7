"""`pctrain rl` as a user runs it: every algorithm, a kill before an update, half steps, and the recorded files."""

import json
import math

import pytest

from tests.helpers import tiny
from tests.helpers.tiny import rl_options


def _rl(arguments, crash_at=None, refuse_sampling_of=()):
    """Run the command in this process.

    It dies before the update of step `crash_at`, and sampling a step that is not allowed fails.
    """
    from unittest import mock

    from pctrain.distributed.health import watchdog
    from pctrain.rl import loop

    make_batch, sample = loop.make_batch, loop.GroupSampler.sample_groups

    def dying(*arguments):
        if watchdog._step == crash_at:
            raise KeyboardInterrupt
        return make_batch(*arguments)

    def counted(self, prompts, step):
        assert step not in refuse_sampling_of, f"step {step} was sampled again"
        return sample(self, prompts, step)

    with (
        mock.patch.object(loop, "make_batch", dying),
        mock.patch.object(loop.GroupSampler, "sample_groups", counted),
    ):
        return tiny.cli("rl", *map(str, arguments))


@pytest.fixture(scope="module")
def whole(ranks, sft_run, tmp_path_factory):
    """Return an RL run that was never interrupted."""
    folder = tmp_path_factory.mktemp("rl") / "whole"
    [(status, errors)] = ranks.run(_rl, rl_options(sft_run, folder), world=1, deadline=240)
    assert status == 0, errors
    return folder


def test_a_finished_rollout_is_not_sampled_again(ranks, sft_run, whole, tmp_path):
    """A run killed in step 4 after its rollouts resumes at step 2 and samples neither step 3 nor step 4 again."""
    folder = tmp_path / "run"
    [(status, _)] = ranks.run(_rl, rl_options(sft_run, folder), 4, world=1, deadline=240)
    assert status == 130
    assert sorted(path.name for path in (folder / "rollouts").glob("*.npz")) == [
        "step-3.replay.npz",
        "step-4.replay.npz",
    ]
    [(status, errors)] = ranks.run(_rl, rl_options(sft_run, folder), None, (1, 2, 3, 4), world=1, deadline=240)
    assert status == 0, errors
    assert tiny.metrics(folder) == tiny.metrics(whole) and tiny.ledger(folder) == tiny.ledger(whole)
    assert not list((folder / "rollouts").glob("*.npz"))
    assert (folder / "hf" / "model.safetensors").read_bytes() == (whole / "hf" / "model.safetensors").read_bytes()


def _debug_train(arguments):
    import contextlib
    import io

    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        status, errors = tiny.cli("rl", *map(str, arguments))
    return status, out.getvalue() + errors


def test_half_a_step_at_a_time(ranks, sft_run, whole, tmp_path):
    folder = tmp_path / "run"
    [(status, errors)] = ranks.run(_rl, [*rl_options(sft_run, folder), "--debug-rollout-only"], world=1, deadline=240)
    file = folder / "rollouts" / "step-1.replay.npz"
    assert (
        status == 0
        and file.exists()
        and not (folder / "summary.json").exists()
        and not (folder / "metrics.jsonl").exists()
    ), errors
    before = sorted(path.name for path in folder.rglob("*"))
    train = [*rl_options(sft_run, tmp_path / "none"), "--debug-train-only", file]
    [(status, text)] = ranks.run(_debug_train, train, world=1, deadline=240)
    first = tiny.metrics(whole, "train")[0]
    assert status == 0 and "update 1 of 1: loss " in text and "nothing was written" in text
    assert float(text.split("grad_norm ")[1].split()[0]) == pytest.approx(first["grad_norm"], rel=1e-4)
    assert not (tmp_path / "none").exists() and before == sorted(path.name for path in folder.rglob("*"))
    [(status, errors)] = ranks.run(_rl, rl_options(sft_run, folder), None, (1,), world=1, deadline=240)
    assert status == 0, errors
    assert tiny.metrics(folder) == tiny.metrics(whole)


def test_both_halves_at_once_are_refused(ranks, sft_run, tmp_path):
    command = [*rl_options(sft_run, tmp_path / "run"), "--debug-rollout-only", "--debug-train-only=x.npz"]
    [(status, errors)] = ranks.run(_rl, command, world=1)
    assert status == 2 and "give one of them" in errors


def test_what_is_written_down(whole):
    train = tiny.metrics(whole, "train")
    for line in train:
        assert line["max/mismatch"] < 1e-4 and line["mismatch/mean"] <= line["max/mismatch"]  # fp32, engine and learner
        assert line["mismatch/beyond_2x"] == 0 and abs(line["mismatch/kl"]) < 1e-6
        assert abs(line["ratio"] - 1) < 1e-4
    rows = [json.loads(line) for line in (whole / "rollouts" / "step-1.jsonl").read_text().splitlines()]
    assert {
        "prompt",
        "response",
        "answer",
        "reward",
        "cause",
        "advantage",
        "tokens",
        "finish",
        "kept",
        "why",
        "group",
    } <= set(rows[0])
    kept = [row for row in rows if row["kept"]]
    assert abs(sum(row["advantage"] for row in kept)) < 1e-3 and all(
        row["advantage"] is None for row in rows if not row["kept"]
    )
    summary = json.loads((whole / "summary.json").read_text())["summary"]
    assert summary["best checkpoint"].startswith(str(whole / "checkpoints"))


ALGORITHMS = {
    "grpo": ["--rl.algorithm.kl_coef=0.01"],
    "dapo_d": ["--rl.algorithm.normaliser=sequence", "--rl.algorithm.is_correction=token"],
    "dapo_dc": [
        "--rl.truncated=masked",
        "--rl.algorithm.overlong_buffer=4",
        "--rl.algorithm.kl_coef=0.01",
        "--rl.algorithm.kl_kind=k1",
    ],
    "luffy": [],
    "srft": [],
    "upt": [],
    "prefix_rft": [],
}


def _train_with_each(commands):
    """Every algorithm trains for two steps; one engine serves all of them."""
    from pctrain.config.load import load
    from pctrain.core.session import begin
    from pctrain.rl import loop
    from pctrain.rollout.worker import RolloutWorker

    with begin(load(None, list(map(str, commands[0])))) as first, RolloutWorker(first) as worker:
        for command in commands:
            with begin(load(None, list(map(str, command)))) as config:
                loop.train(config, worker)


def test_every_algorithm_trains(ranks, sft_run, tmp_path):
    more = ["--rl.steps=2", f"--data.rl={sft_run}/data/train.jsonl", "--rl.eval_every=2"]
    commands = [
        [*rl_options(sft_run, tmp_path / name), f"--rl.algorithm={name}", *more, *own]
        for name, own in ALGORITHMS.items()
    ]
    ranks.run(_train_with_each, commands, world=1, deadline=280)
    for name in ALGORITHMS:
        train = tiny.metrics(tmp_path / name, "train")
        assert len(train) == 2, name
        for line in train:
            assert line["grad_norm"] > 0, name
            assert all(math.isfinite(value) for value in line.values() if isinstance(value, float)), (name, line)
    kl = [line["kl"] for line in tiny.metrics(tmp_path / "grpo", "train")]
    assert abs(kl[0]) < 1e-6 < kl[1]  # the reference is the initial policy and does not change


def test_experts_are_missing(ranks, sft_run, tmp_path):
    (tmp_path / "bare.jsonl").write_text('{"prompt": "1+1=", "answer": "2"}\n')
    command = [*rl_options(sft_run, tmp_path / "run"), "--rl.algorithm=luffy", f"--data.rl={tmp_path}/bare.jsonl"]
    [(status, errors)] = ranks.run(_rl, command, world=1)
    assert status == 2 and "bare.jsonl:1" in errors and "response" in errors


@pytest.mark.full  # the fast tier covers this on one rank
def test_a_killed_run_keeps_its_rollouts_at_two_ranks(ranks, sft_run, tmp_path):
    folder, short = tmp_path / "run", ["--rl.steps=1", "--rl.eval_every=1"]
    for status, _ in ranks.run(_rl, rl_options(sft_run, folder, *short), 1, world=2, deadline=240):
        assert status == 130
    assert (folder / "rollouts" / "step-1.replay.npz").exists()
    for status, errors in ranks.run(_rl, rl_options(sft_run, folder, *short), None, (1,), world=2, deadline=240):
        assert status == 0, errors
