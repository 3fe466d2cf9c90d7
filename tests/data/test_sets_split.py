"""`pctrain data split`: every record on one side, no question on both, and nothing left behind where it refuses."""

import hashlib
import json
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pctrain.data.sets.text import normal_text
from tests.helpers import sets_cli as cli

QUESTIONS = [
    "What is 1+1?",
    "what  is\t1+1?",
    "WHAT IS 1+1?",
    "\uff57hat is 1+1?",
    "Name a prime.",
    "name a PRIME.",
    "Solve x=2",
    "e",
    "é",
    "É",
    "ß",
    "SS",
]


@settings(max_examples=40)
@given(st.lists(st.sampled_from(QUESTIONS), min_size=2, max_size=30), st.integers(1, 29), st.integers(0, 3))
def test_every_record_is_on_one_side_and_no_question_on_both(questions, size, seed):
    with TemporaryDirectory() as folder:
        path = cli.write(
            Path(folder) / "all.jsonl", [{"prompt": q, "response": str(i), "extra": i} for i, q in enumerate(questions)]
        )
        out = Path(folder) / "out"
        status, _, errors = cli.run_status("split", path, f"--out={out}", f"--validation={size}", f"--seed={seed}")
        if status:
            groups = [sum(normal_text(q) == normal_text(other) for other in questions) for q in questions]
            assert size >= len(questions) or min(groups) > size, errors
            assert not out.exists() or set(groups) == {len(questions)}
            return
        train, validation = cli.read(out / "train.jsonl"), cli.read(out / "validation.jsonl")
    assert sorted(record["extra"] for record in train + validation) == list(range(len(questions)))
    assert [r["extra"] for r in train] == sorted(r["extra"] for r in train)
    assert not {normal_text(r["prompt"]) for r in train} & {normal_text(r["prompt"]) for r in validation}
    assert 1 <= len(validation) <= size


def test_the_manifest_says_what_went_in_and_came_out(tmp_path):
    records = [{"prompt": f"question {i}", "response": "r", "answer": i, "source": {"name": "s"}} for i in range(50)]
    path = cli.write(tmp_path / "all.jsonl", records)
    with open(path, "a") as stream:
        stream.write("not json\n")
    printed = cli.run("split", path, f"--out={tmp_path / 'out'}", "--validation=0.1")
    assert "0 (both sets were read again)" in printed
    out = tmp_path / "out"
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["overlap"] == 0 and manifest["command"] == "data split"
    assert manifest["records"] == {"read": 51, "kept": 50, "dropped": {"unusable: malformed_json": 1}}
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    assert manifest["inputs"] == [{"file": str(path), "bytes": path.stat().st_size, "sha256": digest}]
    assert {o["file"]: o["records"] for o in manifest["outputs"]} == {"train.jsonl": 45, "validation.jsonl": 5}
    [fault] = cli.read(out / "dropped.jsonl")
    assert fault["where"] == f"{path}:51" and "malformed JSON" in fault["message"]
    for record in cli.read(out / "train.jsonl"):
        assert record in records  # with every column it came with
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["all.jsonl", "out"]


def test_the_same_questions_are_held_out_whatever_the_order_of_the_records(tmp_path):
    records = [{"prompt": f"question {i}", "response": "r"} for i in range(60)]
    for name, order in (("one", records), ("two", records[::-1])):
        cli.run("split", cli.write(tmp_path / f"{name}.jsonl", order), f"--out={tmp_path / name}", "--validation=7")
    held_out = [{r["prompt"] for r in cli.read(tmp_path / name / "validation.jsonl")} for name in ("one", "two")]
    assert held_out[0] == held_out[1] and len(held_out[0]) == 7
    cli.run("split", tmp_path / "one.jsonl", f"--out={tmp_path / 'three'}", "--validation=7", "--seed=1")
    assert {r["prompt"] for r in cli.read(tmp_path / "three" / "validation.jsonl")} != held_out[0]


def test_near_questions_stay_together_where_asked(tmp_path):
    base = (
        "A farmer has {} cows and sells a third of them at the market in the next town "
        "on a rainy day in the month of May how many stay"
    )
    records = [
        {"prompt": base.format(1000 + i // 4) + (" ?", " please.", " now", "!")[i % 4], "response": "r"}
        for i in range(80)
    ]
    path = cli.write(tmp_path / "all.jsonl", records)
    number = lambda r: r["prompt"].split()[3]  # noqa: E731
    sides = {}
    for name, options in (("plain", []), ("near", ["--near", "--threshold=0.85"])):
        cli.run("split", path, f"--out={tmp_path / name}", "--validation=20", *options)
        sides[name] = [
            {number(r) for r in cli.read(tmp_path / name / f"{side}.jsonl")} for side in ("train", "validation")
        ]
    assert sides["plain"][0] & sides["plain"][1]  # without it the same cows are on both sides
    assert not sides["near"][0] & sides["near"][1]


@pytest.mark.parametrize(
    "options, message",
    [
        (["--validation=5"], "5 records to hold out, but there are only 5"),
        (["--validation=1.5"], "expected a whole number of records, or a share below 1"),
        (["--validation=x"], "--validation: expected a valid number, got 'x'"),
        (["--valdation=1"], "unknown option --valdation; did you mean --validation?"),
        (["--val-idation=1"], "did you mean --validation?"),
        (["--data.fields.prompt=question", "--validation=1"], "no record can be used; the first is"),
        (["--data.fields.promt=question"], "did you mean data.fields.prompt"),
        (["--validation"], "--validation needs a value"),
        (["--validation=1", "--validation=2"], "given more than once"),
    ],
)
def test_what_cannot_work_is_refused_and_nothing_is_left(tmp_path, options, message):
    path = cli.write(tmp_path / "all.jsonl", [{"prompt": f"q{i}", "response": "r"} for i in range(5)])
    assert message in cli.refused("split", path, f"--out={tmp_path / 'out'}", *options)
    assert [entry.name for entry in tmp_path.iterdir()] == ["all.jsonl"]


def test_an_output_that_exists_is_not_touched(tmp_path):
    path = cli.write(tmp_path / "all.jsonl", [{"prompt": f"q{i}", "response": "r"} for i in range(5)])
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine").write_text("x")
    assert "exists already" in cli.refused("split", path, f"--out={out}", "--validation=1")
    assert [entry.name for entry in out.iterdir()] == ["mine"]
    assert "needs --out" in cli.refused("split", path)
