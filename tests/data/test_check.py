"""`pctrain data check`: what it counts, what it says, and its exit status."""

import gzip
import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pctrain.cli import main as cli
from pctrain.config.tree import ArchitectureConfig
from pctrain.data import scratch_model as hf_dir
from pctrain.data.check import count_unclosed_boxes
from pctrain.data.lengths import bin_edges
from pctrain.data.writing import write_records

CHAT = [{"role": "user", "content": "1+1?"}, {"role": "assistant", "content": "\\boxed{2}"}]


def good(i):
    return {"prompt": f"{i}+{i}=", "response": f"it is \\boxed{{{2 * i}}}", "answer": str(2 * i)}


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """run(*arguments) -> (exit status, text, check.json); it runs in tmp_path."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments):
        try:
            status = cli.main(["data", "check", *map(str, arguments)])
        except SystemExit as end:
            status = end.code
        figures = tmp_path / "data-check" / "check.json"
        captured = capsys.readouterr()
        return status, captured.out + captured.err, json.loads(figures.read_text()) if figures.exists() else None

    return run


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("check") / "model"
    texts = [text for i in range(200) for text in (good(i)["prompt"], good(i)["response"])]
    return hf_dir.make_hf_dir(
        folder, ArchitectureConfig(context=32, hidden=16, heads=2, kv_heads=2, ffn=16), texts, vocab_size=330, seed=0
    )


def kinds(figures):
    return {trouble["kind"]: trouble["count"] for trouble in figures["troubles"]}


def test_good_files_of_several_forms_pass(run, tmp_path):
    write_records("train.parquet", [good(i) for i in range(30)])
    write_records("chat.jsonl.zst", [{"messages": CHAT, "answer": 2}])
    write_records("test.jsonl", [{"prompt": "what?", "answer": 5}])
    status, text, figures = run("*.*")
    assert status == 0 and "all 32 records of 3 files can be used" in text
    assert [(f["path"], f["read_as"], f["records"], f["chats"]) for f in figures["files"]] == [
        ("chat.jsonl.zst", "trajectories", 1, 1),
        ("test.jsonl", "problems", 1, 0),
        ("train.parquet", "trajectories", 30, 0),
    ]
    assert "columns: chat: messages from messages, answer from answer (chat.jsonl.zst)" in text
    assert (
        figures["passed"] and figures["troubles"] == [] and figures["lengths"]["response, characters"]["records"] == 31
    )
    assert (tmp_path / "data-check" / "lengths.png").read_bytes().startswith(b"\x89PNG")


SPOILED = [
    (b'{"prompt": "\xff"}', "not_utf8"),
    (b'{"prompt": ', "malformed_json"),
    (b"[]", "not_an_object"),
    (b'{"response": "r"}', "missing_field"),
    (b'{"prompt": 1, "response": "r"}', "wrong_type"),
    (b'{"prompt": "", "response": "r"}', "empty_prompt"),
    (b'{"prompt": "p", "response": " "}', "empty_response"),
    (b'{"prompt": "\\ud800", "response": "r"}', "surrogate"),
]


@pytest.mark.parametrize("line, kind", SPOILED)
def test_a_record_that_cannot_be_used_is_counted_and_named(run, tmp_path, line, kind):
    lines = [json.dumps(good(i)).encode() for i in range(3)]
    (tmp_path / "train.jsonl").write_bytes(b"\n".join([*lines[:2], line, lines[2], line]))
    status, text, figures = run("train.jsonl")
    assert status == 1 and "FAILED: 2 of 5 records of 1 file cannot be used" in text
    assert kinds(figures) == {kind: 2} and figures["records"] == 3 and figures["unusable"] == 2
    assert [place for place, _ in figures["troubles"][0]["first"]] == ["train.jsonl:3", "train.jsonl:5"]
    assert f"unusable: 2 {kind}: {figures['troubles'][0]['advice']}" in text and "\n  train.jsonl:3: " in text


def test_problems_need_an_answer(run):
    write_records("test.jsonl", [{"prompt": "p", "answer": "1"}, {"prompt": "q", "answer": ""}, {"prompt": "r"}])
    status, _, figures = run("test.jsonl")
    assert status == 1 and kinds(figures) == {"empty_answer": 1, "missing_field": 1}


def test_remarks_do_not_fail(run):
    rows = [
        good(0),
        good(1),
        good(0),
        {**good(1), "response": "another \\boxed{2}"},
        {**good(2), "response": "\\boxed{\\frac{1}{2}"},
        {**good(3), "response": "no box"},
        {"prompt": "no answer", "response": "r"},
    ]
    write_records("a.jsonl", rows)
    write_records("b.jsonl", [good(1)])
    status, text, figures = run("a.jsonl", "b.jsonl")
    assert status == 0 and figures["passed"]
    assert kinds(figures) == {
        "duplicate_record": 2,
        "duplicate_prompt": 1,
        "unclosed_box": 1,
        "no_box": 1,
        "no_answer": 1,
    }
    first = {trouble["kind"]: trouble["first"] for trouble in figures["troubles"]}
    assert first["duplicate_record"] == [["a.jsonl:3", "as a.jsonl:1"], ["b.jsonl:1", "as a.jsonl:2"]]
    assert first["duplicate_prompt"] == [["a.jsonl:4", "as a.jsonl:2"]]
    assert [first[kind][0][0] for kind in ("unclosed_box", "no_box", "no_answer")] == [
        "a.jsonl:5",
        "a.jsonl:6",
        "a.jsonl:7",
    ]
    assert "worth a look: 2 duplicate_record" in text


def test_texts_that_are_the_same_only_when_joined_are_no_duplicates(run):
    write_records("a.jsonl", [{"prompt": "ab", "response": "c"}, {"prompt": "a", "response": "bc"}])
    assert kinds(run("a.jsonl")[2]) == {}


def test_only_the_first_places_are_named(run):
    write_records("a.jsonl", [good(0)] * 100)
    _, text, figures = run("a.jsonl")
    assert (
        len(figures["troubles"][0]["first"]) == 5
        and kinds(figures) == {"duplicate_record": 99}
        and "and 94 more" in text
    )


def test_no_picture_of_an_earlier_check_stays(run, tmp_path):
    write_records("a.jsonl", [good(0)])
    write_records("b.jsonl", [{"prompt": "p"}])
    run("a.jsonl")
    assert (tmp_path / "data-check" / "lengths.png").exists()
    assert run("b.jsonl")[0] == 1 and not (tmp_path / "data-check" / "lengths.png").exists()


def test_the_same_file_named_twice_is_read_once(run):
    write_records("a.jsonl", [good(0)])
    assert run("a.jsonl", "*.jsonl")[2]["records"] == 1


def test_an_archive_that_is_cut_off_does_not_hide_the_other_files(run, tmp_path):
    rows = b"".join(json.dumps(good(i)).encode() + b"\n" for i in range(2000))
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(rows)[:-20])
    write_records("b.jsonl", [good(i) for i in range(5000, 5004)])
    (tmp_path / "c.jsonl").write_text("\n")
    status, text, figures = run("a.jsonl.gz", "b.jsonl", "c.jsonl")
    assert status == 1 and kinds(figures) == {"unreadable_file": 1, "empty_file": 1}
    assert [file["records"] for file in figures["files"]][1:] == [4, 0] and "cut off or damaged after line" in text


def test_lengths_in_tokens_and_samples_over_the_context(run, model):
    long = {"prompt": "1+1=", "response": "1" * 40, "answer": "1"}
    write_records("train.jsonl", [good(i) for i in range(9)] + [long])
    status, text, figures = run("train.jsonl", "--model.path", model)
    assert status == 1 and kinds(figures)["overlong"] == 1 and figures["context"] == 32
    assert "train.jsonl:10: 45 tokens, more than 32" in text
    assert (
        figures["lengths"]["sample, tokens"]["largest"] == 45
        and figures["lengths"]["response, tokens"]["largest"] == 41
    )
    status, _, figures = run("train.jsonl", f"--model.path={model}", "--data.overlong=drop")
    assert status == 0 and kinds(figures)["overlong_policy"] == 1


def test_what_the_encoder_refuses_cannot_be_used(run, model):
    write_records("chat.jsonl", [{"messages": CHAT}])
    assert run("chat.jsonl")[0] == 0, "without a model nobody needs its template"
    status, _, figures = run("chat.jsonl", f"--model.path={model}")
    assert status == 1 and kinds(figures) == {"no_template": 1}


def test_the_mapping_of_the_config_is_used(run):
    write_records("a.jsonl", [{"q": {"text": "p"}, "a": "r"}])
    assert run("a.jsonl")[0] == 1
    status, text, _ = run("--data.fields.prompt=q.text", "a.jsonl", "--data.fields.response", "a")
    assert status == 0 and "columns: plain: prompt from q.text, response from a" in text


def test_text_of_the_data_cannot_reach_the_terminal_as_a_command(run):
    write_records(
        "a.jsonl", [{"prompt": "[bold]p", "response": "\x1b[31m\\boxed{", "answer": "\x07"}, {"[red]\x1b[31mcolumn": 1}]
    )
    _, text, _ = run("a.jsonl")
    assert "\x1b" not in text and "\x07" not in text and "[red] [31mcolumn" in text


@pytest.mark.parametrize(
    "arguments, message",
    [
        ((), "pctrain data check: expected one or more files"),
        (("none.jsonl",), "none.jsonl does not exist"),
        (("*.jsonl",), "no file matches"),
        (("a.jsonl", "--data.feilds.prompt=q"), "unknown key"),
        (("a.jsonl", "--model.path=nowhere"), "nowhere"),
    ],
)
def test_bad_arguments_end_with_2_and_write_nothing(run, tmp_path, arguments, message):
    (tmp_path / "a.jsonl").touch() if "a.jsonl" in arguments else None
    status, text, figures = run(*arguments)
    assert status == 2 and message in text and figures is None


@given(st.lists(st.integers(1, 10**6), min_size=1, max_size=50), st.integers(1, 50))
def test_every_length_falls_into_one_bin(values, bins):
    values = np.array(values)
    edges = bin_edges(values, bins)
    counts, _ = np.histogram(values, edges)
    assert counts.sum() == len(values) and (np.diff(edges) > 0).all() and len(edges) <= 2 * bins + 2


@pytest.mark.parametrize(
    "text, expected",
    [
        ("no box", None),
        ("\\boxed 5", None),
        ("\\boxed{5}", 0),
        ("\\boxed{\\frac{1}{2}}", 0),
        ("\\boxed{5", 1),
        ("{ \\boxed{5}", 0),
        ("\\boxed{\\{1\\}}", 0),
        ("\\boxed{\\}", 1),
        ("\\boxed{1} \\boxed {2", 1),
        ("}}\\boxed{1}", 0),
        ("\\boxed{\\boxed{1}", 1),
    ],
)
def test_boxes(text, expected):
    assert count_unclosed_boxes(text) == expected
