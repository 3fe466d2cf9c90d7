"""An engine fails, a rank stops answering, a scheduler wants its machine: the run ends and can be resumed."""

import os
import re
import signal
import time

import pytest

from pctrain.distributed.health.watchdog import GRACE_SECONDS
from pctrain.run.records import read_values
from tests.helpers import tiny
from tests.helpers.forked import Forked
from tests.helpers.tiny import rl_options

DEADLINE = 20  # seconds; on a busy machine half of this goes to starting a checkpoint's helper process


@pytest.fixture(scope="module")
def forked():
    with Forked() as server:
        yield server


def rl(sft_run, folder, *more):
    return ["rl", *rl_options(sft_run, folder, "--run.tensorboard=false", "--rl.eval_every=4", *more)]


def sft(folder, *more):
    return [
        "sft",
        *tiny.OPTIONS,
        f"--run.dir={folder}",
        "--sft.eval_every=0",
        "--sft.steps=40",
        "--sft.checkpoint_every=10",
        "--sft.val_every=10",
        "--run.tensorboard=false",
        *more,
    ]


def wait_for_step(folder, step, runs):
    end = time.monotonic() + 120
    while max(read_values(folder, "train", "loss"), default=0) < step:
        assert time.monotonic() < end and all(run.poll() is None for run in runs), [
            run.log.read_text()[-2000:] for run in runs
        ]
        time.sleep(0.02)


def finished(runs):
    assert [run.wait(200) for run in runs] == [0] * len(runs), [run.log.read_text()[-2000:] for run in runs]


@pytest.mark.full  # the fast tier covers this without torch, in test_health.py
def test_an_engine_that_raises_on_one_rank(forked, sft_run, tmp_path):
    folder = tmp_path / "run"
    runs = forked.start_ranks(rl(sft_run, folder), tmp_path / "logs", 2, "engine_raises")
    assert [run.wait(200) for run in runs] == [1, 1]
    output, other = (run.log.read_text() for run in runs)
    assert "error: rank 1 failed in phase rollout of step 3: RuntimeError: the engine ran out of pages" in output
    assert "resume from the newest checkpoint" in output and "error:" not in other
    assert {path.name for path in folder.glob("faults/*/*")} == {"rank-0.txt", "rank-1.txt"}
    finished(forked.start_ranks(rl(sft_run, folder), tmp_path / "logs", 2))
    assert "resumed from step-2" in (folder / "train.log").read_text()
    assert list(read_values(folder, "train", "reward")) == [1, 2, 3, 4]


@pytest.mark.full
def test_an_engine_that_hangs(forked, sft_run, tmp_path):
    folder = tmp_path / "run"
    [run] = forked.start_ranks(
        rl(sft_run, folder, f"--parallel.timeout={DEADLINE}"), tmp_path / "logs", 1, "engine_hangs"
    )
    assert run.wait(200) == 1
    output = run.log.read_text()
    assert (
        "error: rank 0 made no progress for 2" in output
        and "s in phase rollout of step 3, at " in output
        and "in act" not in output
    )
    assert "engine.py" in output


@pytest.mark.full  # the fast tier covers this without torch, in test_health.py
def test_a_rank_that_stops_answering(forked, tmp_path):
    folder = tmp_path / "run"
    runs = forked.start_ranks(sft(folder, f"--parallel.timeout={DEADLINE}"), tmp_path / "logs", 2)
    wait_for_step(folder, 12, runs)
    os.kill(runs[1].pid, signal.SIGSTOP)
    try:
        assert (
            runs[0].wait(DEADLINE + GRACE_SECONDS + 60) == 1
        )  # one minute allows for a busy machine; gloo alone would wait for half an hour
    finally:
        runs[1].kill()
    output = runs[0].log.read_text()
    assert "error: rank 1 does not answer: dead, stopped, or cut off. Rank 0 waited for it in phase " in output
    finished(forked.start_ranks(sft(folder), tmp_path / "logs", 2))
    assert "resumed from step-10" in (folder / "train.log").read_text()


def test_a_run_asked_to_stop_saves_and_resumes_later(forked, tmp_path):
    """One of two ranks gets SIGTERM; both leave, and the resumed run equals an uninterrupted one."""
    whole, folder = tmp_path / "whole", tmp_path / "run"
    undisturbed = forked.start_ranks(sft(whole), tmp_path / "logs-whole", 2)
    runs = forked.start_ranks(sft(folder), tmp_path / "logs", 2)
    wait_for_step(folder, 13, runs)
    os.kill(runs[1].pid, signal.SIGTERM)
    finished(runs)
    assert "to be continued: " in runs[0].log.read_text() and "to be continued" not in runs[1].log.read_text()
    assert (folder / "to-be-continued").exists()
    last = max(read_values(folder, "train", "loss"))
    assert (
        13 <= last < 40
        and (folder / "checkpoints" / f"step-{last}").is_dir()
        and not (folder / "summary.json").exists()
    )
    finished(forked.start_ranks(sft(folder), tmp_path / "logs", 2))
    finished(undisturbed)
    assert not (folder / "to-be-continued").exists()
    assert tiny.metrics(folder) == tiny.metrics(whole)


def test_a_rank_that_is_slow_is_named(forked, tmp_path):
    runs = forked.start_ranks(
        sft(tmp_path / "run", "--sft.steps=44", "--sft.checkpoint_every=44"), tmp_path / "logs", 2, "rank_1_is_slow"
    )
    finished(runs)
    log = (tmp_path / "run" / "train.log").read_text()
    assert re.search(r"step 41 rank 1 \(.*data 1\) holds up the others in phase update: ", log), log
    assert not re.search("rank 0 .* holds up", log)
    output = runs[0].log.read_text()
    assert "slowest rank" in output and "update rank 1" in output
