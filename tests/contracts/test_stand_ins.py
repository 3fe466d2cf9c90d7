"""Tests replace other packages' functions and classes only by what has their signatures."""

import ast
from pathlib import Path

import pytest
import torch.nn.attention.varlen
from vllm import LLM

from tests.contracts.replaced import Replacement, replacements
from tests.contracts.tables import TABLES
from tests.helpers.stand_ins import check_stand_in

ROOT = Path(__file__).parents[2]
# Stand-ins that are given to our own code, not put in a package: FILE:NAME -> the real object.
GIVEN = {"tests/core/test_layer_specs.py:_of_torch_2_13": torch.nn.attention.varlen.varlen_attn}


@pytest.fixture(scope="module")
def found() -> list[Replacement]:
    return [r for file in sorted((ROOT / "tests").rglob("*.py")) for r in replacements(file, ROOT, TABLES)]


def test_replacements_have_the_real_signatures(found):
    assert len(found) > 10
    faults = [fault for replacement in found for fault in replacement.faults()]
    assert not faults, "\n".join(faults)


@pytest.mark.parametrize("place", GIVEN)
def test_stand_ins_that_are_given_have_the_real_signatures(place):
    file, _, name = place.partition(":")
    [function] = [n for n in ast.parse((ROOT / file).read_text()).body if getattr(n, "name", "") == name]
    assert not list(Replacement(place, GIVEN[place], function).faults())


class Faithful:
    def sleep(self, level): ...

    def wake_up(self, tags=None) -> bool:
        return True


class ReturnsNothing:
    def wake_up(self, tags=None) -> bool:
        pass


class SaysNothing:
    def wake_up(self, tags=None):
        return True


class TakesTooMuch:
    def sleep(self, level, deep=False): ...


class TakesAnything:
    def sleep(self, *args): ...


class Requires:
    def enqueue(self, sampling_params) -> list[str]:
        return []


class Invents:
    def nap(self): ...


@pytest.mark.parametrize(
    ("stand_in", "fault"),
    [
        (ReturnsNothing, "wake_up: never returns a value; the real one returns bool"),
        (SaysNothing, "wake_up -> nothing that it says: the real one returns bool"),
        (TakesTooMuch, r"sleep\(deep=False\): the real one takes"),
        (TakesAnything, r"sleep\(\*args\): the real one takes"),
        (Requires, "does not take 'prompts', which the real one requires"),
        (Invents, "nap: vllm.entrypoints.llm.LLM has no such attribute"),
    ],
)
def test_a_stand_in_that_differs(stand_in, fault):
    check_stand_in(Faithful, LLM)
    with pytest.raises(AssertionError, match=fault):
        check_stand_in(stand_in, LLM)


@pytest.mark.parametrize(
    ("code", "fault"),
    [
        ("p.setattr(LLM, 'wake_up', lambda self, tags=None: None)", "never returns a value"),
        ("p.setattr(LLM, 'wake_up', lambda self, tag=None: True)", "lambda(tag"),
        ("p.setattr(torch.cuda, 'set_device', lambda: None)", "does not take 'device'"),
        ("class E:\n    def wait_for(self): ...\np.setattr(torch.cuda, 'Event', E)", "Event has no wait_for"),
    ],
)
def test_a_replacement_that_differs(code, fault, tmp_path):
    (tmp_path / "file.py").write_text(f"import torch\nfrom vllm import LLM\n{code}")
    [replacement] = replacements(tmp_path / "file.py", tmp_path, TABLES)
    assert any(fault in found for found in replacement.faults()), list(replacement.faults())


def test_annotations_are_compared_by_their_last_names():
    def real(x) -> "list[torch.Tensor] | None":
        return [x]

    def fake(x) -> list[torch.Tensor] | None:
        return [x]

    check_stand_in(fake, real)
