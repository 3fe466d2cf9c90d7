"""Generated problems: right, different, the same again, and disjoint."""

import json
import random
import re
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pctrain.common.errors import UserError
from pctrain.config.tree import FieldsConfig, ProblemsConfig
from pctrain.data import arithmetic
from pctrain.data.sources import read_records

BOX = re.compile(r"\\boxed\{(-?\d+)\}$")


def value(text: str) -> int:
    """Sum of the signed numbers of a chain, without eval."""
    return sum(int(n) for n in re.findall(r"(?:^|(?<=\d))[+-]?\d+", text))


def problems(**changes) -> ProblemsConfig:
    return ProblemsConfig(**{"train": 60, "validation": 20, "test": 30, "rl": 40, **changes})


@given(st.integers(0, 50), st.integers(2, 5), st.integers(0, 2), st.sampled_from([9, 20, 9999]))
def test_problems_are_right_disjoint_and_of_the_difficulty_asked_for(seed, min_terms, more, max_operand):
    config = problems(min_terms=min_terms, max_terms=min_terms + more, max_operand=max_operand)
    sets = arithmetic.generate(config, seed)
    assert {name: len(records) for name, records in sets.items()} == {
        "train": 60,
        "validation": 20,
        "test": 30,
        "rl": 40,
    }
    prompts = [record.prompt for records in sets.values() for record in records]
    assert len(set(prompts)) == 150  # disjoint by prompt
    for name, records in sets.items():
        for record in records:
            operands = [int(n) for n in re.findall(r"\d+", record.prompt)]
            assert min_terms <= len(operands) <= min_terms + more
            assert min(operands) >= 1 and max(operands) <= max_operand
            assert record.prompt.endswith("=") and value(record.prompt[:-1]) == int(record.answer)
            assert (record.response is not None) == (name != "test")
            if record.response:
                assert BOX.search(record.response).group(1) == record.answer
                steps = re.findall(r"(-?\d+)([+-])(\d+)=(-?\d+)", record.response)
                assert len(steps) == len(operands) - 1
                assert all(int(a) + int(sign + b) == int(c) for a, sign, b, c in steps)
                assert [int(a) for a, *_ in steps] == [operands[0], *(int(c) for *_, c in steps[:-1])]


def test_the_same_seed_gives_the_same_and_another_seed_other_problems():
    a, b, c = (arithmetic.generate(problems(), seed) for seed in (1, 1, 2))
    assert a == b
    assert len({r.prompt for r in a["test"]} & {r.prompt for r in c["test"]}) < 5


def test_generation_leaves_the_global_random_state_alone():
    random.seed(1)
    expected = random.random()
    random.seed(1)
    arithmetic.generate(problems(), 0)
    assert random.random() == expected


def test_more_training_problems_leave_the_others_as_they_were():
    few, many = arithmetic.generate(problems(), 0), arithmetic.generate(problems(train=600), 0)
    assert all(few[name] == many[name] for name in ("test", "validation", "rl"))


def test_lengths_are_mixed_evenly_and_words_vary():
    records = arithmetic.generate(problems(train=600), 0)["train"]
    assert Counter(len(re.findall(r"\d+", r.prompt)) for r in records) == {3: 300, 4: 300}
    words = {word for r in records for word in re.findall(r"[a-z]{2,}", r.response.split("\\")[0])}
    assert {"then", "and", "so", "thus", "hence", "giving"} == words


def test_the_whole_space_can_be_asked_for_and_no_more():
    # 2 terms of operands 1 to 3: 3 x 3 x 2 = 18 problems; 3 terms: 27 x 4 = 108
    space = {"min_terms": 2, "max_terms": 3, "max_operand": 3, "validation": 20, "test": 30, "rl": 40}
    sets = arithmetic.generate(problems(train=36, **space), 0)
    assert len({r.prompt for records in sets.values() for r in records}) == 126
    with pytest.raises(UserError, match=r"127 records asked for .* only 126 different problems have 2 to 3 terms"):
        arithmetic.generate(problems(train=37, **space), 0)


def test_written_files_read_back_and_are_the_same_bytes_again(tmp_path):
    paths = arithmetic.write_sets(problems(), 5, tmp_path / "a")
    for name, records in arithmetic.generate(problems(), 5).items():
        need = ("response", "answer") if name != "test" else ("answer",)
        read = read_records(paths[name], FieldsConfig(), need=need)
        assert [(r.prompt, r.response, r.answer) for r in read] == [(r.prompt, r.response, r.answer) for r in records]
        assert ("response" in json.loads(paths[name].read_text().splitlines()[0])) == (name != "test")
    again = arithmetic.write_sets(problems(), 5, tmp_path / "b")
    assert all(paths[name].read_bytes() == again[name].read_bytes() for name in paths)
    assert sorted(p.name for p in (tmp_path / "a").iterdir()) == sorted(
        f"{name}.jsonl" for name in paths
    )  # nothing else
