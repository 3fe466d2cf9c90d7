"""Bad input ends with one message that names the culprit, exit status 2, and nothing half written."""

import json
import shutil

import pytest

from tests.helpers import tiny
from tests.helpers.tiny import rl_options


def refused(ranks, command, arguments, *words):
    [(status, errors)] = ranks.run(tiny.cli, command, *map(str, arguments), world=1)
    assert status == 2 and "Traceback" not in errors, errors
    for word in words:
        assert word in errors, errors


def sft_options(sft_run, folder, **data):
    paths = {name: sft_run / "data" / f"{name}.jsonl" for name in ("train", "validation", "test", "rl")} | data
    return [
        *tiny.OPTIONS,
        *(f"--data.{k}={v}" for k, v in paths.items()),
        f"--model.path={sft_run}/model",
        f"--run.dir={folder}",
    ]


@pytest.mark.parametrize(
    "text, words",
    [
        ('{"prompt": "1+1=", "response": "2"}\n{"prompt": "1+', ["bad.jsonl:2", "malformed JSON"]),
        ('{"response": "2"}\n', ["bad.jsonl:1", "prompt"]),
        ('{"prompt": "1+1="}\n', ["bad.jsonl:1", "response"]),
        ("", ["bad.jsonl", "empty"]),
        (json.dumps({"prompt": "1+1=", "response": "2" * 400}) + "\n", ["bad.jsonl:1", "context", "160"]),
    ],
    ids=["malformed", "no prompt", "no response", "empty", "too long"],
)
def test_training_data(ranks, sft_run, tmp_path, text, words):
    (tmp_path / "bad.jsonl").write_text(text)
    refused(ranks, "sft", sft_options(sft_run, tmp_path / "run", train=tmp_path / "bad.jsonl"), *words)
    assert not list(tmp_path.glob("run/metrics.jsonl")) and not list(tmp_path.glob("run/checkpoints/*"))


def test_problems_without_an_answer(ranks, sft_run, tmp_path):
    (tmp_path / "bad.jsonl").write_text('{"prompt": "1+1="}\n')
    refused(
        ranks,
        "rl",
        [*rl_options(sft_run, tmp_path / "run"), f"--data.rl={tmp_path}/bad.jsonl"],
        "bad.jsonl:1",
        "answer",
    )
    assert not (tmp_path / "run" / "config.yaml").exists()


@pytest.mark.parametrize("command", ["sft", "rl"])
def test_a_test_problem_longer_than_the_longest_prompt(ranks, sft_run, tmp_path, command):
    """The error comes before a run is created that would be bound to this config."""
    (tmp_path / "test.jsonl").write_text(
        '{"prompt": "1+1=", "answer": "2"}\n{"prompt": "11111111111111111111=", "answer": "2"}\n'
    )
    arguments = [
        *(sft_options(sft_run, tmp_path / "run") if command == "sft" else rl_options(sft_run, tmp_path / "run")),
        f"--data.test={tmp_path}/test.jsonl",
        "--rollout.max_prompt=16",
        "--data.overlong=drop",
    ]
    refused(ranks, command, arguments, "test.jsonl:2: the prompt has 21 tokens, more than rollout.max_prompt of 16")
    assert not (tmp_path / "run" / "config.yaml").exists()


def test_a_missing_file(ranks, sft_run, tmp_path):
    refused(ranks, "sft", sft_options(sft_run, tmp_path / "run", train=tmp_path / "none.jsonl"), "none.jsonl")
    assert not (tmp_path / "run" / "config.yaml").exists()


def test_an_unknown_key(ranks, tmp_path):
    refused(ranks, "sft", [f"--run.dir={tmp_path}/run", "--sft.stepz=3"], "sft.stepz", "sft.steps")
    assert not (tmp_path / "run").exists()


def test_a_folder_of_another_config(ranks, sft_run):
    before = (sft_run / "metrics.jsonl").read_bytes()
    refused(
        ranks,
        "sft",
        [*tiny.OPTIONS, f"--run.dir={sft_run}", "--sft.eval_every=0", "--sft.optimizer.lr=1e-3"],
        "sft.optimizer.lr",
        "another config",
    )
    assert (sft_run / "metrics.jsonl").read_bytes() == before


@pytest.fixture
def unfinished(sft_run, tmp_path):
    """Copy the SFT run so that it looks killed after its second-to-last checkpoint."""
    copy = tmp_path / "copy"
    shutil.copytree(sft_run, copy)
    (copy / "summary.json").unlink()
    shutil.rmtree(copy / "checkpoints" / "step-120")
    return copy


def test_a_checkpoint_with_a_missing_file(ranks, unfinished):
    next((unfinished / "checkpoints" / "step-100").glob("*.distcp")).unlink()
    refused(
        ranks,
        "sft",
        [*tiny.OPTIONS, f"--run.dir={unfinished}", "--sft.eval_every=0"],
        "step-100",
        ".distcp is missing",
        "step-80",
    )


def test_a_changed_data_file_on_resume(ranks, unfinished):
    with open(unfinished / "data" / "train.jsonl", "a") as file:
        file.write('{"prompt": "1+1=", "response": "2", "answer": "2"}\n')
    refused(ranks, "sft", [*tiny.OPTIONS, f"--run.dir={unfinished}", "--sft.eval_every=0"], "train.jsonl", "changed")


def test_a_finished_run_says_so_and_changes_nothing(ranks, sft_run):
    before = {path: path.stat().st_mtime_ns for path in sft_run.rglob("*") if path.is_file() and path.name != ".lock"}
    [(status, errors)] = ranks.run(
        tiny.cli, "sft", *tiny.OPTIONS, f"--run.dir={sft_run}", "--sft.eval_every=0", world=1
    )
    assert status == 0, errors
    assert before == {
        path: path.stat().st_mtime_ns for path in sft_run.rglob("*") if path.is_file() and path.name != ".lock"
    }
