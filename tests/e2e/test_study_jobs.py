"""A real study over two sets: two jobs share one folder, one is killed, and RL stops when its ceiling is known."""

import json
import time
from types import SimpleNamespace
from unittest import mock

import pytest

from tests.helpers import tiny
from tests.helpers.forked import Forked
from tests.helpers.tiny import rl_options


def study_arguments(sft_run, folder, *more):
    """Return two sets from the trajectories of `sft_run`: the shorter and the longer ones."""
    lines = sorted((sft_run / "data" / "train.jsonl").read_text().splitlines(keepends=True), key=len)
    for name, part in (("easy", lines[:100]), ("hard", lines[100:])):
        (folder.parent / f"{name}.jsonl").write_text("".join(part))
    sets = json.dumps({name: str(folder.parent / f"{name}.jsonl") for name in ("easy", "hard")})
    data = [f"--data.{name}={sft_run}/data/{name}.jsonl" for name in ("validation", "test", "rl")]
    return [
        "run",
        *tiny.OPTIONS,
        *data,
        f"--model.path={sft_run}/model",
        f"--run.dir={folder}",
        f"--study.sets={sets}",
        "--sft.steps=80",
        "--sft.eval_every=80",
        "--rl.steps=2",
        "--rl.eval_every=1",
        "--study.checkpoints=[0, 60]",
        *more,
    ]


@pytest.mark.full
@pytest.mark.timeout(900)
def test_two_jobs_meet_in_one_folder_and_one_of_them_is_killed(ranks, sft_run, tmp_path):
    folder = tmp_path / "study"
    arguments = study_arguments(sft_run, folder)
    with Forked() as forked:
        one = forked.start(arguments, tmp_path / "one.log")
        while not (folder / "sets" / "easy" / "sft" / "metrics.jsonl").exists():
            assert one.poll() is None, one.log.read_text()[-3000:]
            time.sleep(0.05)
        other = forked.start(arguments, tmp_path / "other.log")
        while (
            not (folder / "sets" / "hard" / "sft" / "metrics.jsonl").exists()
            and not (folder / "rl-step-0" / "metrics.jsonl").exists()
        ):
            assert other.poll() is None, other.log.read_text()[-3000:]
            time.sleep(0.05)
        assert one.kill() == -9
        assert other.wait(600) == 0, other.log.read_text()[-3000:]
        output = other.log.read_text()
        assert "5 stages, policy paper" in output and "running: process" in output
        assert "Which set first?" in output and "What does the evidence not support?" in output

        found = sorted(str(path.parent.relative_to(folder)) for path in folder.rglob("summary.json"))
        assert found == ["rl-step-0", "sets/easy/rl-step-60", "sets/easy/sft", "sets/hard/rl-step-60", "sets/hard/sft"]
        study = json.loads((folder / "report" / "study.json").read_text())
        assert [run["set"] for run in study["sft"]] == ["easy", "hard"] and {run["size"] for run in study["sft"]} == {
            100
        }
        assert [(run["set"], run["start_step"]) for run in study["rl"]] == [("", 0), ("easy", 60), ("hard", 60)]

        before = {name: (folder / name / "metrics.jsonl").read_bytes() for name in found}
        again = forked.start(arguments, tmp_path / "again.log")
        assert again.wait(200) == 0, again.log.read_text()[-3000:]
        assert before == {name: (folder / name / "metrics.jsonl").read_bytes() for name in found}
        assert "about 0 FLOPs of training compute left" in again.log.read_text()

    # The job that took over after the kill ends with the numbers of an uninterrupted one.
    [(status, errors)] = ranks.run(
        tiny.cli, *study_arguments(sft_run, tmp_path / "whole", "--only=easy"), world=1, deadline=400
    )
    assert status == 0, errors
    for name in ("sets/easy/sft", "sets/easy/rl-step-60"):
        assert tiny.metrics(folder / name) == tiny.metrics(tmp_path / "whole" / name)
    assert not (tmp_path / "whole" / "sets" / "hard").exists() and not (tmp_path / "whole" / "report").exists()


def _rl_with_ceiling_at(found_at, *arguments):
    """Run `pctrain rl` with a fit that calls the ceiling identified from `found_at` scores on.

    Return also the number of scores that each call of the fit saw.
    """
    from pctrain.rl import journal

    def fit(folder):
        scores = len(tiny.metrics(folder, "eval"))
        asked.append(scores)
        verdict = "identified" if scores >= found_at else "lower_bound"
        return SimpleNamespace(verdict=verdict, a_post=50.0, a_post_low=49.5, a_post_high=50.8)

    asked: list[int] = []
    with mock.patch.object(journal, "fit_run", fit):
        return (*tiny.cli("rl", *arguments), asked)


@pytest.mark.parametrize("within, ends", [(1.0, 2), pytest.param(0.7, 4, marks=pytest.mark.full)])
def test_rl_stops_when_its_ceiling_is_known(ranks, sft_run, tmp_path, within, ends):
    """The fit's interval reaches 0.8 points from the estimate."""
    folder = tmp_path / "run"
    command = rl_options(sft_run, folder, "--rl.eval_every=1", "--rl.checkpoint_every=4", f"--rl.stop_within={within}")
    [(status, errors, asked)] = ranks.run(_rl_with_ceiling_at, 3, *command, world=1, deadline=240)
    assert status == 0, errors
    assert [line["step"] for line in tiny.metrics(folder, "eval")] == list(range(ends + 1))
    assert json.loads((folder / "summary.json").read_text())["summary"]["steps"] == ends
    assert ("rl.stop_within" in (folder / "train.log").read_text()) == (ends == 2) and (
        folder / "checkpoints" / f"step-{ends}"
    ).is_dir()
    if ends == 2:  # killed between its last checkpoint and its summary: it does not train further
        (folder / "summary.json").unlink()
        [(status, errors, asked)] = ranks.run(_rl_with_ceiling_at, 3, *command, world=1, deadline=240)
        assert status == 0, errors
        assert [line["step"] for line in tiny.metrics(folder, "train")] == [1, 2] and asked == [3]
