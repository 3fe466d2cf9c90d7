r"""Benchmarks in the columns they are published in: the problem that is asked, and its gold answer."""

import gzip
import json

import datasets
import pyarrow as pa
import pyarrow.parquet
import pytest

from pctrain.common.errors import UserError
from pctrain.config.load import load
from pctrain.config.tree import Config
from pctrain.evaluate.benchmarks import CHOICE_INSTRUCTION, read_benchmarks
from pctrain.reward.verifiers import VERIFIERS
from tests.helpers import sets_cli as cli

GPQA = {
    "Record ID": "rec1",
    "Question": "Which one?",
    "Correct Answer": "right\n",
    "Incorrect Answer 1": "a",
    "Incorrect Answer 2": "b",
    "Incorrect Answer 3": "c",
    "Subdomain": "Physics",
}
ARC = {
    "id": "Mercury_1",
    "question": "Why?",
    "choices": {"text": ["sun", "moon", "rain"], "label": ["1", "2", "3"]},
    "answerKey": "3",
}
LAYOUTS = {
    "gsm8k": ({"question": "How many?", "answer": "48/2 = <<48/2=24>>24\nso 48+24\n#### 72"}, "How many?", "72"),
    "math": (
        {"problem": "Find $x$.", "level": "Level 5", "type": "Algebra", "solution": r"We get $\boxed{\frac{1}{2}}$."},
        "Find $x$.",
        r"\frac{1}{2}",
    ),
    "math500": (
        {
            "problem": "Find $x$.",
            "solution": r"$\boxed{7}$",
            "answer": "7",
            "subject": "Algebra",
            "level": 1,
            "unique_id": "t/1.json",
        },
        "Find $x$.",
        "7",
    ),
    "minerva": (
        {"idx": 0, "problem": "How far?", "type": "Astronomy", "solution": r"So $\boxed{1.8}$ \mathrm{~cm}"},
        "How far?",
        "1.8",
    ),
    "minerva-hf": ({"question": "How far?", "answer": "1.8"}, "How far?", "1.8"),
    "olympiadbench": (
        {
            "id": 1606,
            "question": "Compute.",
            "solution": ["..."],
            "final_answer": ["$\\frac{3}{4}$"],
            "is_multiple_answer": False,
            "unit": None,
            "answer_type": "Numerical",
        },
        "Compute.",
        "$\\frac{3}{4}$",
    ),
    "olympiadbench-physics": (
        {"question": "How fast?", "context": "A ball falls.", "final_answer": ["3"], "unit": "m/s", "error": "1e-1"},
        "A ball falls.\nHow fast?",
        "3",
    ),
    "olympiadbench-several": (
        {"question": "Find all.", "final_answer": ["$1$", "$2$"], "is_multiple_answer": True},
        "Find all.",
        "1, 2",
    ),
    "aime24": ({"ID": "2024-II-4", "Problem": "Let x.", "Solution": "...", "Answer": 33}, "Let x.", "33"),
    "aime25": ({"problem": "Let y.", "answer": "070", "id": "0"}, "Let y.", "070"),
    "plain": ({"prompt": "1+1=", "answer": 2, "response": "2"}, "1+1=", "2"),
    "retu": (
        {"extra_info": {"question": "Q", "answer": "long"}, "reward_model": {"ground_truth": "5"}, "prompt": []},
        "Q",
        "5",
    ),
}


def config(path, **benchmark):
    return Config(eval={"benchmarks": {"it": {"path": path, **benchmark}}})


def read(path, **benchmark):
    [found] = read_benchmarks(config(path, **benchmark))
    return found


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_published_layout_is_recognized_by_its_columns(tmp_path, layout):
    record, prompt, answer = LAYOUTS[layout]
    [question] = read(cli.write(tmp_path / "b.jsonl", [record])).questions
    assert (question.record.question, question.answer, question.where) == (prompt, answer, f"{tmp_path}/b.jsonl:1")


def test_the_record_decides_the_order_of_gpqas_choices(tmp_path):
    records = [GPQA | {"Question": f"Which one, {i}?", "Record ID": f"rec{i}"} for i in range(40)]
    found = read(cli.write(tmp_path / "gpqa.jsonl", records))
    assert found.verifier == "choice" and found.questions[3].record.id == "rec3"
    assert {question.answer for question in found.questions} == set("ABCD")
    for question in found.questions:
        text = question.record.question
        assert (
            f"{question.answer}) right\n" in text
            and text.endswith(f"\n\n{CHOICE_INSTRUCTION}")
            and text.startswith("Which one, ")
        )
        assert VERIFIERS["choice"](rf"so \boxed{{{question.answer}}}", question.answer).cause == "right"
    again = read(cli.write(tmp_path / "later.jsonl", records[::-1]))
    assert again.questions[::-1][7].record.prompt == found.questions[7].record.prompt


@pytest.mark.parametrize(
    "record",
    [ARC, ARC | {"choices": [{"text": t, "label": n} for t, n in zip(["sun", "moon", "rain"], "123", strict=True)]}],
)
def test_arc_keeps_its_order_and_has_letters(tmp_path, record):
    [question] = read(cli.write(tmp_path / "arc.jsonl", [record]), instruction="").questions
    assert question.record.question == "Why?\n\nA) sun\nB) moon\nC) rain" and question.answer == "C"


def test_every_form_of_file_is_read(tmp_path):
    """Read a table in which a column has a null and whole numbers next to it became floats."""
    rows = [{"problem": "a", "answer": 12.0}, {"problem": "b", "answer": 7.0}]
    plain = cli.write(tmp_path / "b.jsonl", rows)
    packed = tmp_path / "b.jsonl.gz"
    packed.write_bytes(gzip.compress(plain.read_bytes()))
    pa.parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "b.parquet")
    datasets.Dataset.from_list(rows).save_to_disk(str(tmp_path / "folder"))
    pa.parquet.write_table(pa.Table.from_pylist([GPQA, GPQA | {"Question": "Other?"}]), tmp_path / "gpqa.parquet")
    pa.parquet.write_table(pa.Table.from_pylist([ARC]), tmp_path / "arc.parquet")
    for path in (plain, packed, tmp_path / "b.parquet", tmp_path / "folder"):
        assert [(q.record.prompt, q.answer) for q in read(path).questions] == [("a", "12"), ("b", "7")], path
    assert (
        len(read(tmp_path / "gpqa.parquet").questions) == 2
        and read(tmp_path / "arc.parquet").questions[0].answer == "C"
    )


def test_fields_instruction_samples_and_verifier_come_from_the_config(tmp_path):
    path = cli.write(tmp_path / "own.jsonl", [{"task": {"q": "Say."}, "gold": ["x", "y"], "id": "k"}])
    text = (
        "eval:\n  samples: 3\n  instruction: 'In a box.'\n  benchmarks:\n"
        f"    short: {cli.write(tmp_path / 's.jsonl', [GPQA])}\n"
        f"    own: {{path: {path}, samples: 5, verifier: exact, fields: {{prompt: task.q, answer: gold.1}}}}\n"
    )
    (tmp_path / "c.yaml").write_text(text)
    short, own = read_benchmarks(load(tmp_path / "c.yaml", [], sections=("eval",)))
    assert (own.samples, own.verifier, own.questions[0].record.question, own.questions[0].answer) == (
        5,
        "exact",
        "Say.\n\nIn a box.",
        "y",
    )
    assert (short.samples, short.verifier) == (3, "choice") and "In a box." not in short.questions[0].record.question


@pytest.mark.parametrize(
    "records, message",
    [
        (
            [{"question": "q", "answer": "1"}, {"question": "q", "gold": "1"}],
            ":2: eval.benchmarks.it: no layout is known that has the columns "
            "gold, question; known are question + correct answer",
        ),
        ([{"problem": "p", "solution": "no box"}], r":1: eval.benchmarks.it: its solution has no \boxed{}"),
        ([{"problem": " ", "answer": "1"}], "its problem is empty"),
        ([{"problem": "p", "answer": [1]}], "column 'answer': expected a text or a number, got [1]"),
        ([{"question": "q", "final_answer": []}], "its final_answer is empty"),
        ([{"question": "q <img_3362>", "final_answer": ["1"]}], "take the sets whose name has TO (text only)"),
        (
            [{"question": "q", "context": "See <image_1>.", "final_answer": ["1"]}],
            ":1: eval.benchmarks.it: its question shows a picture",
        ),
        ([ARC | {"answerKey": "D"}], "answerKey 'D' is not one of the labels 1, 2, 3 of 3 choices"),
        ([ARC, {"question": "q", "answer": "1"}], "mixes multiple choice with other problems"),
        ([], "eval.benchmarks.it has no record"),
    ],
)
def test_a_record_without_a_known_layout_is_named_with_its_place(tmp_path, records, message):
    with pytest.raises(UserError) as error:
        read(cli.write(tmp_path / "b.jsonl", records))
    assert message in str(error.value) and str(tmp_path / "b.jsonl") in str(error.value)


@pytest.mark.parametrize(
    "benchmarks, message",
    [
        ("{a/b: x.jsonl}", "'a/b' becomes the name of a folder"),
        (
            "{a: {path: x.jsonl, sample: 3}}",
            "eval.benchmarks.a.sample (command line): unknown key; an item takes path, samples",
        ),
        ("{a: {samples: 3}}", "eval.benchmarks.a.path (command line): missing; an item takes path, samples"),
        (
            "{a: {path: x.jsonl, verifier: strickt}}",
            "eval.benchmarks.a.verifier = 'strickt' is no verifier (did you mean strict?)",
        ),
        ("{a: 5}", "eval.benchmarks.a (command line): expected"),
    ],
)
def test_a_wrong_benchmark_of_the_config_is_named(benchmarks, message):
    with pytest.raises(UserError) as error:
        load(None, [f"--eval.benchmarks={benchmarks}"], sections=("eval",))
    assert message in str(error.value)


def test_the_judge_is_a_function():
    with pytest.raises(UserError, match=r"eval.judge = 'strict': expected module:function"):
        load(None, ["--eval.judge=strict"], sections=("eval",))


def test_a_config_with_benchmarks_survives_its_own_yaml(tmp_path):
    from pctrain.config.load import dump

    config = load(None, ["--eval.benchmarks={a: x.jsonl, b: {path: y, fields: {prompt: q}}}"], sections=())
    (tmp_path / "c.yaml").write_text(dump(config))
    assert (
        load(tmp_path / "c.yaml", [], sections=()) == config
        and json.loads(config.model_dump_json())["eval"]["benchmarks"]["a"]["path"]
    )
