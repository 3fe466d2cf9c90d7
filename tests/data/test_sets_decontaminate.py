"""`pctrain data decontaminate`: copies are found, paraphrases stay, short problems do not match everything."""

import pytest

from pctrain.data.sets.text import words
from tests.helpers import sets_cli as cli

LONG = (
    "Let $x$ and $y$ be positive real numbers such that $\\frac{1}{x} + \\frac{1}{y} = 2$. "
    "Find, with proof, the minimum value of "
    "$x + 4y$ over all such pairs, and say where it is reached."
)
COPY = (
    "LET x and   y be positive real numbers such that \\( \\dfrac{1}{x}+\\dfrac{1}{y} = 2 \\)\n "
    "find with proof the minimum value of "
    "\\(x+4 y\\) over all such pairs"
)
PARAPHRASE = (
    "Suppose that the reciprocals of two positive reals x, y sum to 2. "
    "How small can the first plus four times the second be?"
)
SHORT = "What is 12 + 5 worth?"
FILLER = [
    {
        "prompt": f"How many of the {i} birds in the tree fly away when {i // 2} hunters shoot once each?",
        "response": "r",
    }
    for i in range(20)
]


def decontaminate(tmp_path, prompts, benchmark, *options):
    data = cli.write(
        tmp_path / "train.jsonl",
        [{"id": str(i), "prompt": p, "response": "so \\boxed{1}"} for i, p in enumerate(prompts)],
    )
    against = cli.write(tmp_path / "bench.jsonl", [{"prompt": p, "answer": "1"} for p in benchmark])
    out = tmp_path / "clean.jsonl"
    printed = cli.run("decontaminate", data, f"--against={against}", f"--out={out}", *options)
    return [r["id"] for r in cli.read(out)], cli.dropped(out), cli.manifest(out), printed


def test_copies_are_found_whatever_their_typesetting_and_paraphrases_stay(tmp_path):
    kept, dropped, manifest, _ = decontaminate(
        tmp_path, [LONG, COPY, f"Answer this. {LONG} Box it.", PARAPHRASE], [LONG]
    )
    assert kept == ["3"]
    assert [d["id"] for d in dropped] == ["0", "1", "2"]
    assert dropped[1]["prompt"] == "bench.jsonl:1" and dropped[1]["shared"].split() == words(COPY)[:13]
    assert manifest["benchmarks"] == [
        {
            "benchmark": str(tmp_path / "bench.jsonl"),
            "prompts": 1,
            "prompts_found": 1,
            "records_dropped": 3,
            "boilerplate_ngrams": 0,
        }
    ]


def test_a_short_problem_is_found_whole_and_not_inside_another_formula(tmp_path):
    copies = ["what is 12+5 worth", "Question: What is 12 + 5 worth? Think."]
    others = ["What is 112 + 5 worth?", "What is 12 + 51 worth?", "What is 12 * 5 worth?", "What is 12 + 5?"]
    kept, dropped, _, _ = decontaminate(tmp_path, copies + others, [SHORT])
    assert [d["id"] for d in dropped] == ["0", "1"] and kept == ["2", "3", "4", "5"]
    bare = ["so compute now 2+3", "so compute now 2 + 3 * 4", "so compute now 2 + 31"]
    (tmp_path / "bare").mkdir()
    kept, _, _, _ = decontaminate(tmp_path / "bare", bare, ["compute now 2+3"])
    assert kept == ["1", "2"]


def test_the_shortest_problems_are_found_only_as_whole_questions(tmp_path):
    kept, dropped, _, _ = decontaminate(
        tmp_path, ["2+3=", "What is 2+3=5 good for?", "7", "There are 7 trees", "?"], ["2 + 3 =", "7", "!"]
    )
    assert kept == ["1", "3", "4"] and [d["shared"] for d in dropped] == ["2 + 3 =", "7"]


def test_what_all_prompts_of_a_benchmark_share_is_not_looked_for(tmp_path):
    ending = " Let us think step by step and put the final answer of the whole problem within a box, please."
    benchmark = [f["prompt"] + ending for f in FILLER]
    records = ["Who discovered the planet Neptune by calculation?" + ending, benchmark[3]]
    kept, dropped, manifest, _ = decontaminate(tmp_path, records, benchmark)
    assert kept == ["0"] and [d["id"] for d in dropped] == ["1"]
    assert manifest["benchmarks"][0]["boilerplate_ngrams"] > 0


def test_trajectories_are_searched_where_asked(tmp_path):
    data = cli.write(
        tmp_path / "t.jsonl",
        [{"prompt": "Hello?", "response": f"Recall: {LONG}"}, {"prompt": "Hello?", "response": "no"}],
    )
    against = cli.write(tmp_path / "bench.jsonl", [{"prompt": LONG}])
    for search, left in (("question", 2), ("record", 1)):
        cli.run("decontaminate", data, f"--against={against}", f"--out={tmp_path / search}.jsonl", f"--search={search}")
        assert len(cli.read(tmp_path / f"{search}.jsonl")) == left


def test_each_benchmark_has_its_own_figures(tmp_path):
    data = cli.write(tmp_path / "t.jsonl", [{"prompt": LONG, "response": "r"}, *FILLER])
    paths = [
        cli.write(tmp_path / "one.jsonl", [{"prompt": LONG}]),
        cli.write(tmp_path / "two.jsonl", [FILLER[7], FILLER[8]]),
    ]
    out = tmp_path / "out.jsonl"
    printed = cli.run("decontaminate", data, *(f"--against={path}" for path in paths), f"--out={out}")
    assert [(b["prompts_found"], b["records_dropped"]) for b in cli.manifest(out)["benchmarks"]] == [(1, 1), (2, 2)]
    assert "two.jsonl" in printed


@pytest.mark.parametrize(
    "benchmark, message", [('{"question": "q"}\n', "has no field 'prompt'"), ("", "no record can be used")]
)
def test_a_benchmark_that_cannot_be_read_is_an_error(tmp_path, benchmark, message):
    data = cli.write(tmp_path / "t.jsonl", FILLER)
    (tmp_path / "bench.jsonl").write_text(benchmark)
    assert message in cli.refused(
        "decontaminate", data, f"--against={tmp_path / 'bench.jsonl'}", f"--out={tmp_path / 'out.jsonl'}"
    )
    assert "needs --against" in cli.refused("decontaminate", data, f"--out={tmp_path / 'out.jsonl'}")


def test_all_records_contaminated_is_an_error_that_leaves_nothing(tmp_path):
    data = cli.write(tmp_path / "t.jsonl", FILLER)
    errors = cli.refused("decontaminate", data, f"--against={data}", f"--out={tmp_path / 'out.jsonl'}")
    assert "no record is left" in errors and "20 contaminated" in errors
    assert [entry.name for entry in tmp_path.iterdir()] == ["t.jsonl"]


def test_words_are_those_of_the_documentation():
    assert words(r"Find $\left(\dfrac{1}{2}\right) \cdot 3 \leq 1,000$ — \text{Real}; 3.14" "\u22122") == [
        "find",
        "frac",
        "1",
        "2",
        "*",
        "3",
        "<",
        "=",
        "1000",
        "-",
        "real",
        "3.14",
        "-",
        "2",
    ]
