"""`pctrain show`: the rollouts of a step in the terminal."""

import json

import pytest

from pctrain.cli import main as cli


def row(group, k, **more):
    return {
        "id": f"p{group}",
        "group": group,
        "prompt": f"{group}+1=",
        "response": f"text {k} [red]\\boxed{{{k}}}",
        "answer": str(group + 1),
        "reward": float(k == 0),
        "cause": "right" if k == 0 else "wrong",
        "advantage": 1.5 - k,
        "tokens": 7,
        "finish": "stop",
        "kept": True,
        "why": "",
        **more,
    }


@pytest.fixture
def run(tmp_path):
    folder = tmp_path / "rollouts"
    folder.mkdir()
    for step in (1, 12):
        rows = [row(group, k) for group in range(3) for k in range(2)]
        rows += [row(3, k, kept=False, why="all wrong", reward=0.0, advantage=None, finish="length") for k in range(2)]
        (folder / f"step-{step}.jsonl").write_text(
            "".join(json.dumps(r | {"response": r["response"] + f" at {step}"}) + "\n" for r in rows)
        )
    (folder / "step-2.replay.npz").write_bytes(b"")
    return tmp_path


def show(capsys, *arguments):
    status = cli.main(["show", *map(str, arguments)])
    out = capsys.readouterr()
    return status, out.out + out.err


def test_the_newest_step_and_what_is_kept(capsys, run):
    status, text = show(capsys, run)
    assert status == 0 and "at 12" in text and "at 1 " not in text
    assert "text 0 [red]\\boxed{0}" in text  # a model's text is not markup
    assert "p2" in text and "1 of 2 right" in text and "+1.500" in text
    assert "4 prompts, 3 kept, 1 dropped; mean reward 0.375" in text and "all wrong" not in text


def test_a_step_its_dropped_prompts_and_fewer_of_them(capsys, run):
    status, text = show(capsys, run, "--step", "1", "--dropped")
    assert status == 0 and "at 1" in text and "dropped: all wrong" in text and "(cut)" in text
    status, text = show(capsys, run, "--step=1", "--prompts=1")
    assert "p0" in text and "p1" not in text and "2 more prompts: show them with --prompts=3" in text


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--step", "5"], ["no rollouts of step 5", "from 1 to 12"]),
        (["--step", "x"], ["--step", "'x'"]),
        (["--stepp=3"], ["did you mean --step"]),
    ],
)
def test_a_missing_step_and_wrong_options(capsys, run, arguments, words):
    status, text = show(capsys, run, *arguments)
    assert status == 2 and all(word in text for word in words), text


def test_a_folder_without_rollouts_and_a_broken_file(capsys, run, tmp_path):
    status, text = show(capsys, tmp_path / "rollouts")
    assert status == 2 and "has no rollouts" in text
    with open(run / "rollouts" / "step-12.jsonl", "a") as file:
        file.write("{\n")
    status, text = show(capsys, run)
    assert status == 2 and "step-12.jsonl:9: not valid JSON" in text


@pytest.mark.parametrize(
    "line",
    [
        "3",
        "null",
        "{}",
        '{"group": 0}',
        json.dumps(row(0, 0, reward="1")),
        json.dumps(row(0, 0, response=None)),
        json.dumps(row(0, 0, prompt="\ud800")),
        "[" * 100_000,
    ],
)
def test_lines_that_are_not_rollouts(capsys, run, line):
    (run / "rollouts" / "step-12.jsonl").write_text(json.dumps(row(0, 0)) + "\n" + line + "\n")
    status, text = show(capsys, run)
    assert status == 2 and "step-12.jsonl:2: " in text
