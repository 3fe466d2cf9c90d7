"""Inject faults into the Triton kernels: the checks of triton_cases.py must detect each of them."""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("run by test_interpreted.py", allow_module_level=True)

from pctrain_kernels import (
    head,
    linear_logprob,
    softmax,
    triton_softmax,
)
from pctrain_kernels.merge import RowStatistics
from tests.helpers.kernel_inputs import (
    check_padding_columns_take_no_part,
)
from tests.helpers.triton_cases import (
    BLOCKS,
    EXAMPLE,
    Case,
    check,
    check_beyond_two_to_the_31,
    check_confident,
    check_head,
)


@pytest.fixture
def mutated(tmp_path, monkeypatch) -> Callable[..., ModuleType]:
    """Return a copy of a module with a piece of its text replaced at the `which`-th of its `times` places."""

    def make(original: ModuleType, old: str, new: str, *, which: int = 0, times: int = 1) -> ModuleType:
        pieces = Path(original.__file__).read_text().split(old)
        assert len(pieces) == times + 1, f"{old!r} is there {len(pieces) - 1} times"
        path = tmp_path / f"mutated_{which}.py"
        path.write_text(old.join(pieces[: which + 1]) + new + old.join(pieces[which + 1 :]))
        spec = importlib.util.spec_from_file_location(path.stem, path)
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, path.stem, module)  # dataclasses look for their module there
        spec.loader.exec_module(module)
        return module

    return make


@pytest.fixture
def mutated_kernels(mutated) -> Callable[..., type]:
    return lambda old, new, **place: mutated(triton_softmax, old, new, **place).TritonSoftmax


PADDED = Case(vocab=1003, tokens=2, layout="padded")


def test_mutation_nothing(mutated_kernels) -> None:
    check(PADDED, kernels=mutated_kernels("exp(y)", "exp(y)", times=2))


@pytest.mark.parametrize("kernel", [0, 1])
def test_mutation_no_padding_mask(mutated_kernels, kernel: int) -> None:
    kernels = mutated_kernels("inside = index < columns", "inside = index >= 0", which=kernel, times=2)
    with pytest.raises(AssertionError):
        check(PADDED, kernels=kernels)


def test_mutation_p_rounded_before_the_one_hot_is_subtracted(mutated_kernels, monkeypatch) -> None:
    kernels = mutated_kernels("exp(y) * factor", "exp(y).to(tl.bfloat16).to(tl.float32) * factor")
    with pytest.raises(AssertionError, match="gradient"):
        check(PADDED, kernels=kernels)

    def of_rounded_p(row: RowStatistics, dlogprob: Tensor, dentropy: Tensor | None, temperature: float) -> Tensor:
        return dlogprob * (1 - row.logprob().exp().bfloat16().float()) / temperature

    for module in (softmax, triton_softmax):
        monkeypatch.setattr(module, "target_gradient", of_rounded_p)
    with pytest.raises(AssertionError):
        check_confident()


def test_mutation_dw_accumulated_in_bf16(gpu_products, monkeypatch) -> None:
    def rounded(accumulator: Tensor, a: Tensor, b: Tensor) -> None:
        accumulator.copy_((accumulator.bfloat16() + (a.float() @ b.float()).bfloat16()).float())

    options = EXAMPLE | {"dtype": torch.float32}
    check_head(options)
    monkeypatch.setattr(head, "add_product", rounded)
    with pytest.raises(AssertionError, match="dW"):
        check_head(options)


def test_mutation_no_padding_mask_in_the_head(mutated, monkeypatch) -> None:
    check_padding_columns_take_no_part()
    monkeypatch.setattr(linear_logprob, "Head", mutated(head, "operand(weight[: max(0, end)])", "operand(weight)").Head)
    with pytest.raises(AssertionError):
        check_padding_columns_take_no_part()


def test_mutation_blocks_downwards(mutated_kernels) -> None:
    """Written in place, a block's gradient would overwrite logits that are still to be read."""
    down = "index = (columns - 1) // block * block - start + tl.arange(0, block)"
    with pytest.raises(AssertionError, match="gradient"):
        check(BLOCKS, kernels=mutated_kernels("index = start + tl.arange(0, block)", down, which=1, times=2))


@pytest.mark.parametrize("kernel", [0, 1])
def test_mutation_offsets_of_32_bits(mutated_kernels, kernel: int) -> None:
    with pytest.raises(AssertionError):
        check_beyond_two_to_the_31(
            mutated_kernels("tl.cast(tl.program_id(0), tl.int64)", "tl.program_id(0)", which=kernel, times=2)
        )
