"""`pctrain sft` on several sources: what it trains on, what it records, and when it stops."""

import gzip
import importlib.util
import json
import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.helpers import tiny

STEPS = 12


@pytest.fixture(scope="module")
def sources(sft_run, tmp_path_factory):
    """Return the same problems in three forms: a plain file, an archive, and RETU's parquet given as a glob."""
    folder = tmp_path_factory.mktemp("sources")
    lines = (sft_run / "data" / "train.jsonl").read_text().splitlines(keepends=True)
    (folder / "plain.jsonl").write_text("".join(lines[:60]))
    (folder / "packed.jsonl.gz").write_bytes(gzip.compress("".join(lines[60:140]).encode()))
    for part, rows in (("1", lines[140:170]), ("2", lines[170:])):
        records = [json.loads(line) for line in rows]
        pq.write_table(
            pa.Table.from_pylist(
                [
                    {
                        "extra_info": {"question": r["prompt"], "answer": r["response"]},
                        "reward_model": {"ground_truth": r["answer"]},
                        "data_source": "arithmetic",
                        "prompt": [{"role": "user", "content": r["prompt"]}],
                    }
                    for r in records
                ]
            ),
            folder / f"retu-{part}.parquet",
        )
    train = [
        {"path": str(folder / "plain.jsonl")},
        {"path": str(folder / "packed.jsonl.gz"), "weight": 0.5},
        {"path": str(folder / "retu-*.parquet"), "weight": 2, "name": "retu"},
    ]
    return train


def arguments(sft_run, folder, train, *more):
    validation = sft_run / "data" / "validation.jsonl"
    held_out = json.dumps([{"path": str(validation)}, {"path": str(sft_run / "data" / "train.jsonl"), "name": "seen"}])
    return [
        "sft",
        *tiny.OPTIONS,
        f"--run.dir={folder}",
        f"--model.path={sft_run}/model",
        f"--data.train={json.dumps(train)}",
        f"--data.validation={held_out}",
        f"--data.test={sft_run}/data/test.jsonl",
        f"--data.rl={sft_run}/data/rl.jsonl",
        "--sft.eval_every=0",
        f"--sft.steps={STEPS}",
        "--sft.val_every=6",
        "--sft.checkpoint_every=4",
        *more,
    ]


def succeed(ranks, *arguments, world=1):
    for status, errors in ranks.run(tiny.cli, *arguments, world=world, deadline=200):
        assert status == 0, errors


@pytest.fixture(scope="module")
def three_sources(ranks, sft_run, sources, tmp_path_factory):
    folder = tmp_path_factory.mktemp("three") / "run"
    succeed(ranks, *arguments(sft_run, folder, sources))
    return folder


def test_what_is_written_down(three_sources):
    train = tiny.metrics(three_sources, "train")
    for line in train:
        parts = [line[f"loss/{name}"] for name in ("plain", "packed", "retu") if f"loss/{name}" in line]
        assert min(parts) <= line["loss"] <= max(parts)  # their mean, weighted by tokens
        assert line["loss_spike"] == 0 and 0 <= line["padding_share"] < 0.05 and line["loss_tokens"] < line["tokens"]
    assert sum("loss/packed" in line for line in train) >= STEPS - 2
    times = [json.loads(line) for line in (three_sources / "metrics.jsonl").read_text().splitlines()]
    times = [line for line in times if line["kind"] == "train"]
    assert all(0 < line["time/mfu"] < 1 and line["time/tokens_per_second"] > 100 for line in times)
    # Every checkpoint is validated too, and every validation records the regime so far.
    val = tiny.metrics(three_sources, "val")
    assert [line["step"] for line in val] == [0, 4, 6, 8, 12]
    assert all(line["regime"] == "stable" for line in val[1:]) and val[-1]["val_loss"] < val[0]["val_loss"]
    assert {"val_loss/validation", "val_loss/seen", "val_loss_se/seen", "val_sample_loss", "val_sample_loss_se"} <= set(
        val[0]
    )
    log = (three_sources / "train.log").read_text()
    assert "training data: packed: 80 trajectories" in log and "weight 0.5" in log and "mfu" in log


def test_tensorboard_has_the_losses_of_the_sources(three_sources):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(three_sources)).Reload()
    assert {"train/loss/retu", "val/val_loss/seen", "train/time/mfu", "val/val_loss"} <= set(events.Tags()["scalars"])


@pytest.mark.parametrize("world", [2, pytest.param(4, marks=pytest.mark.full)])
def test_the_data_parallel_size_changes_nothing(ranks, sft_run, sources, three_sources, tmp_path, world):
    succeed(ranks, *arguments(sft_run, tmp_path / "run", sources), world=world)
    one, other = tiny.metrics(three_sources), tiny.metrics(tmp_path / "run")
    assert [(line["step"], line["kind"]) for line in one] == [(line["step"], line["kind"]) for line in other]
    for a, b in zip(one, other, strict=True):
        assert (a.get("tokens"), a.get("loss_tokens")) == (
            b.get("tokens"),
            b.get("loss_tokens"),
        )  # the same samples in every step
        for key in ("loss", "loss/plain", "loss/retu", "val_loss", "val_loss/seen"):
            assert (key in a) == (key in b) and a.get(key, 0) == pytest.approx(b.get(key, 0), rel=1e-5)


def test_a_killed_run_resumes_at_the_same_sample(ranks, sft_run, sources, three_sources, tmp_path):
    copy = tmp_path / "run"
    shutil.copytree(three_sources, copy)
    (copy / "summary.json").unlink()
    for step in (8, 12):
        shutil.rmtree(copy / "checkpoints" / f"step-{step}")
    succeed(ranks, *arguments(sft_run, copy, sources))
    assert tiny.metrics(copy) == tiny.metrics(three_sources)
    weights = [*sources[:2], {**sources[2], "weight": 3}]
    (copy / "summary.json").unlink()
    [(status, errors)] = ranks.run(tiny.cli, *arguments(sft_run, copy, weights), world=1)
    assert status == 2 and "data.train.2.weight: 2.0 -> 3.0" in errors


def test_epochs_in_place_of_steps(ranks, sft_run, sources, tmp_path):
    """An epoch has 60 + 0.5 x 80 + 2 x 60 = 220 samples, 16 per step."""
    succeed(ranks, *arguments(sft_run, tmp_path / "run", sources, "--sft.epochs=0.5"))
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["summary"]["steps"] == 7
    assert (tmp_path / "run" / "checkpoints" / "step-7").is_dir()
    wsd = ("--sft.epochs=0.5", "--sft.optimizer.schedule=wsd", "--sft.optimizer.warmup=2", "--sft.optimizer.decay=6")
    [(status, errors)] = ranks.run(tiny.cli, *arguments(sft_run, tmp_path / "other", sources, *wsd), world=1)
    assert status == 2 and "are 7 steps" in errors and "sft.optimizer.decay = 6: expected 1 to 5" in errors


def test_a_run_stops_when_its_regime_is_over(ranks, sft_run, tmp_path):
    """The model memorizes twelve trajectories, so the validation loss soon rises."""
    few = tmp_path / "few.jsonl"
    few.write_text("".join((sft_run / "data" / "train.jsonl").read_text().splitlines(keepends=True)[:12]))
    options = [
        "--sft.steps=300",
        "--sft.val_every=10",
        "--sft.checkpoint_every=50",
        "--sft.batch_size=12",
        "--sft.stop_after=stable",
    ]
    command = arguments(sft_run, tmp_path / "run", [str(few)], *options)
    command = [a for a in command if not a.startswith("--data.validation")] + [
        f"--data.validation={sft_run}/data/validation.jsonl"
    ]
    succeed(ranks, *command)
    val = tiny.metrics(tmp_path / "run", "val")
    last = val[-1]["step"]
    assert (
        last < 300
        and [line["regime"] for line in val] == ["stable"] * (len(val) - 1) + ["mild"]
        and val[-1]["advice"] == "stop"
    )
    assert val[-1]["val_loss"] > 1.02 * min(line["val_loss"] for line in val) and val[-1]["minimum_passed"] > 0.95
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["summary"]["steps"] == last and f"checkpoints/step-{val[-1]['rl_start']}" in summary["next_command"]
    assert "the validation loss has passed its minimum" in summary["summary"]["monitor"]
    assert (
        f"RL would start from step {val[-1]['rl_start']}"
        in (tmp_path / "run" / "train.log").read_text().splitlines()[-2]
    )
    # Killed between its last checkpoint and its summary: it does not train further.
    (tmp_path / "run" / "summary.json").unlink()
    succeed(ranks, *command)
    assert tiny.metrics(tmp_path / "run", "val") == val
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["summary"]["steps"] == last


def test_samples_that_are_too_long_are_dropped_and_counted(ranks, sft_run, tmp_path):
    lines = (sft_run / "data" / "train.jsonl").read_text().splitlines(keepends=True)[:40]
    lines.insert(7, json.dumps({"prompt": "1+1=", "response": "2" * 400}) + "\n")
    (tmp_path / "long.jsonl").write_text("".join(lines))
    command = arguments(
        sft_run, tmp_path / "run", [str(tmp_path / "long.jsonl")], "--sft.steps=6", "--data.overlong=drop"
    )
    succeed(ranks, *command)
    assert (
        "training data: long: 40 trajectories" in (log := (tmp_path / "run" / "train.log").read_text())
        and "1 overlong" in log
    )


def test_two_sources_of_one_name_are_refused(ranks, sft_run, tmp_path):
    same = str(sft_run / "data" / "train.jsonl")
    [(status, errors)] = ranks.run(tiny.cli, *arguments(sft_run, tmp_path / "run", [same, same]), world=1)
    assert status == 2 and "name 'train'" in errors and not (tmp_path / "run" / "config.yaml").exists()


def _with_wandb(*arguments):
    import os
    from unittest import mock

    with mock.patch.dict(os.environ, {"WANDB_MODE": "offline", "WANDB_SILENT": "true"}):
        return tiny.cli(*arguments)


@pytest.mark.skipif(importlib.util.find_spec("wandb") is None, reason="wandb is not installed")
def test_weights_and_biases_gets_the_numbers_too(ranks, sft_run, sources, tmp_path):
    command = arguments(sft_run, tmp_path / "run", sources, "--sft.steps=6", "--run.wandb=pctrain-test")
    [(status, errors)] = ranks.run(_with_wandb, *command, world=1, deadline=200)
    assert status == 0, errors
    [log] = (tmp_path / "run" / "wandb").glob("offline-run-*/run-*.wandb")
    written = log.read_bytes()
    assert b"train/loss/retu" in written and b"val/val_loss" in written


def test_weights_and_biases_that_is_not_installed(ranks, sft_run, sources, tmp_path):
    command = arguments(sft_run, tmp_path / "run", sources, "--run.wandb=x")
    [(status, errors)] = ranks.run(_without_wandb, *command, world=1)
    assert status == 2 and "pip install wandb" in errors and not (tmp_path / "run" / "config.yaml").exists()


def _without_wandb(*arguments):
    from unittest import mock

    real = importlib.util.find_spec
    with mock.patch.object(
        importlib.util, "find_spec", lambda name, *rest: None if name == "wandb" else real(name, *rest)
    ):
        return tiny.cli(*arguments)


def test_the_padding_of_a_run_is_small(sft_run):
    assert np.mean([line["padding_share"] for line in tiny.metrics(sft_run, "train")]) < 0.03
