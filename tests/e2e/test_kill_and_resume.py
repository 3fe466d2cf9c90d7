"""SIGKILL in SFT, SIGKILL in RL, the same command again: the numbers equal an uninterrupted run's bit for bit."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.helpers import tiny

ROOT = Path(__file__).resolve().parents[2]


def start(folder):
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}:{os.environ.get('PYTHONPATH', '')}"}
    command = [
        sys.executable,
        "-m",
        "pctrain",
        "run",
        *tiny.OPTIONS,
        f"--run.dir={folder}",
        "--study.starts=[stable]",
        "--run.keep_last=1",
    ]
    with open(folder.with_suffix(".log"), "a") as log:
        return subprocess.Popen(command, env=environment, stdout=log, stderr=log)


def finish(folder):
    assert start(folder).wait(timeout=280) == 0, folder.with_suffix(".log").read_text()[-3000:]


def kill_when(folder, happened):
    process = start(folder)
    deadline = time.monotonic() + 240
    try:
        while not happened():
            assert process.poll() is None, (
                "the run ended before it could be killed:\n" + folder.with_suffix(".log").read_text()[-3000:]
            )
            assert time.monotonic() < deadline, "the run did not come as far as it was to be killed"
            time.sleep(0.01)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()


def recorded(folder, pattern, step):
    """Return whether a run in `folder` has trained `step` steps."""
    files = list(folder.glob(f"{pattern}/metrics.jsonl"))
    return bool(files) and f'{{"step": {step}, "kind": "train"' in files[0].read_text()


@pytest.mark.full  # the fast tier kills an SFT run, an RL run, and a study of fake stages
@pytest.mark.timeout(900)
def test_a_killed_study_ends_with_the_same_numbers(tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    finish(whole)
    kill_when(killed, lambda: recorded(killed, "sft", 47))  # between the checkpoints of steps 40 and 60
    kill_when(killed, lambda: recorded(killed, "rl-step-*", 3))  # between the checkpoints of steps 2 and 4
    finish(killed)
    [rl] = [path.name for path in whole.glob("rl-step-*")]
    for run in ("sft", rl):
        assert tiny.metrics(killed / run) == tiny.metrics(whole / run)
        assert tiny.ledger(killed / run) == tiny.ledger(whole / run)
        for checkpoint in sorted(path.name for path in (whole / run / "checkpoints").iterdir()):
            actual, expected = (folder / run / "checkpoints" / checkpoint for folder in (killed, whole))
            for part in expected.glob("*.distcp"):
                assert (actual / part.name).read_bytes() == part.read_bytes(), f"{run} {checkpoint} {part.name}"
        assert (killed / run / "hf" / "model.safetensors").read_bytes() == (
            whole / run / "hf" / "model.safetensors"
        ).read_bytes()
    assert sorted(path.name for path in (whole / "sft" / "checkpoints").iterdir()) == [
        f"step-{n}" for n in (100, 120, 20, 40, 60, 80)
    ]
    scores = {line["step"]: line["score"] for line in tiny.metrics(whole / rl, "eval") if line["step"]}
    best = max(scores, key=lambda step: (scores[step], -step))
    assert {path.name for path in (whole / rl / "checkpoints").iterdir()} == {
        "step-4",
        f"step-{best}",
    }  # the newest and the best
    for rollouts in (whole / rl / "rollouts").iterdir():
        assert (killed / rl / "rollouts" / rollouts.name).read_bytes() == rollouts.read_bytes()
    assert tiny.metrics(whole / rl, "train")[-1]["grad_norm"] > 0  # RL did something that could have differed
    for name in (
        "report.html",
        "study.json",
        "figures/validation_loss.png",
        "figures/score_vs_compute.png",
        "figures/ceilings.png",
    ):
        assert (killed / "report" / name).stat().st_size > 1000
