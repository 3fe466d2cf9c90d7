"""Checkpoint faults: SIGKILL at random moments (also during a save), another layout after a kill, a changed file."""

import json
import random
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

from pctrain.run.checkpoints import checkpoint_fault, checkpoint_step, list_checkpoints
from tests.helpers import tiny
from tests.helpers.forked import Forked


@pytest.fixture(scope="module")
def forked():
    with Forked() as server:
        yield server


def options(folder, steps, *more):
    return [
        "sft",
        *tiny.OPTIONS,
        f"--run.dir={folder}",
        f"--sft.steps={steps}",
        "--sft.eval_every=0",
        "--sft.val_every=4",
        "--sft.checkpoint_every=2",
        "--run.tensorboard=false",
        *more,
    ]


@dataclass
class Whole:
    """Return an uninterrupted run and its pace on this machine today, in seconds."""

    folder: Path
    start: float  # until its first checkpoint begins
    first_save: float  # this also starts the writers' manager
    interval: float  # from then on, between checkpoints


def uninterrupted(forked, folder, steps):
    began = time.monotonic()
    run = forked.start(options(folder, steps), folder.with_suffix(".log"))
    wait_for(run, lambda: list(folder.glob("checkpoints/*.tmp")))
    first_begun = time.monotonic()
    wait_for(run, lambda: len(steps_of(folder)) >= 1)
    first_done = time.monotonic()
    wait_for(run, lambda: len(steps_of(folder)) == steps // 2)
    interval = (time.monotonic() - first_done) / (steps // 2 - 1)
    assert run.wait(120) == 0, run.log.read_text()[-3000:]
    return Whole(folder, first_begun - began, first_done - first_begun, interval)


@pytest.fixture(scope="module")
def whole(forked, tmp_path_factory):
    return uninterrupted(forked, tmp_path_factory.mktemp("whole") / "run", steps=12)


def steps_of(folder):
    return [checkpoint_step(path) for path in list_checkpoints(folder)]


def wait_for(run, happened):
    end = time.monotonic() + 120
    while not happened() and run.poll() is None:
        assert time.monotonic() < end, run.log.read_text()[-3000:]
        time.sleep(0.005)


def kill_somewhere(run, folder, pace, chance, moment, steps):
    """Kill the run at a random moment: during its start, its first save, or the save after a complete one."""
    before = steps_of(folder)
    if moment == "start":
        time.sleep(chance.uniform(0, pace.start + pace.first_save))
    elif moment == "first save":
        wait_for(run, lambda: list(folder.glob("checkpoints/*.tmp")) or steps in steps_of(folder))
        time.sleep(chance.uniform(0, pace.first_save))
    else:
        wait_for(run, lambda: steps_of(folder) != before or steps in before)
        time.sleep(chance.uniform(0, pace.interval))
    seen = steps_of(folder)
    assert run.kill() == -9, run.log.read_text()[-3000:]
    assert steps_of(folder)[: len(seen)] == seen, "a completed checkpoint is lost"
    for path in list_checkpoints(folder):
        assert checkpoint_fault(path) is None


def assert_same_run(actual, expected):
    assert tiny.metrics(actual) == tiny.metrics(expected)
    assert tiny.ledger(actual) == tiny.ledger(expected)
    assert steps_of(actual) == steps_of(expected)
    for file in [*expected.glob("checkpoints/*/*.distcp"), expected / "hf" / "model.safetensors"]:
        assert (actual / file.relative_to(expected)).read_bytes() == file.read_bytes(), file


def fault_test(forked, folder, whole, steps, moments, seed):
    """Return how many of the kills hit the writing of a checkpoint."""
    chance = random.Random(seed)
    torn = 0
    log = folder.with_suffix(".log")
    for number in range(moments):
        run = forked.start(options(folder, steps), log, "sft_waits_before_its_end")
        kill_somewhere(run, folder, whole, chance, ("next save", "first save", "start")[number % 3], steps)
        torn += bool(list(folder.glob("checkpoints/*.tmp")))
    assert forked.start(options(folder, steps), log).wait(120) == 0, log.read_text()[-3000:]
    assert not list(folder.rglob("*.tmp"))
    assert not forked.orphans(), "a process outlived the run that started it"
    assert_same_run(folder, whole.folder)
    return torn


@pytest.mark.timeout(240)
def test_three_kills(forked, whole, tmp_path):
    fault_test(forked, tmp_path / "run", whole, steps=12, moments=3, seed=0)


@pytest.mark.full
@pytest.mark.timeout(900)
def test_twenty_kills(forked, tmp_path):
    whole = uninterrupted(forked, tmp_path / "whole", steps=80)
    assert 0 < fault_test(forked, tmp_path / "run", whole, steps=80, moments=20, seed=1) < 20


@pytest.fixture
def stopped(forked, tmp_path):
    """Return a run of 12 steps that was killed after its second checkpoint or a little later."""
    folder = tmp_path / "run"
    run = forked.start(options(folder, 12), tmp_path / "log", "sft_waits_before_its_end")
    wait_for(run, lambda: len(steps_of(folder)) >= 2)
    assert run.kill() == -9
    return folder


def test_an_altered_file_is_found_before_training_and_named(forked, stopped, tmp_path):
    newest, before = list_checkpoints(stopped)[-1], list_checkpoints(stopped)[-2]
    part = sorted(newest.glob("*.distcp"))[0]
    data = bytearray(part.read_bytes())
    data[len(data) // 2] ^= 1
    part.write_bytes(data)
    lines = (stopped / "metrics.jsonl").read_bytes()
    assert forked.start(options(stopped, 12), tmp_path / "altered.log").wait(60) == 2
    message = (tmp_path / "altered.log").read_text().replace("\n", " ")
    assert f"{part} was altered" in message and f"delete {newest.name} to resume from {before.name}" in message
    assert (stopped / "metrics.jsonl").read_bytes() == lines  # nothing was cut


def _sft(arguments):
    return tiny.cli(*arguments)


@pytest.mark.timeout(240)
def test_a_killed_run_resumes_at_another_layout(ranks, whole, stopped):
    for status, message in ranks.run(_sft, options(stopped, 12, "--parallel.tensor=2"), world=2):
        assert status == 0, message
    for kind, key in (("train", "loss"), ("val", "val_loss")):
        actual, expected = (
            {line["step"]: line[key] for line in tiny.metrics(folder, kind)} for folder in (stopped, whole.folder)
        )
        assert actual == pytest.approx(expected, rel=1e-5)  # fp32 sums may be computed in another order
    # Each checkpoint records the layout that wrote it.
    layouts = [json.loads((path / "manifest.json").read_text())["layout"] for path in list_checkpoints(stopped)]
    assert [(layout["world"], layout["tensor"]) for layout in (layouts[0], layouts[-1])] == [(1, 1), (2, 2)]
