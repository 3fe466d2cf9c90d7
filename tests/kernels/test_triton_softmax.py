"""The Triton kernels beneath `softmax_of` against float64, on a CPU in Triton's interpreter.

The interpreter is chosen when Triton is imported, so `test_interpreted.py` runs this file in a separate process. A row
and block takes some milliseconds, hence few rows. The interpreter truncates fp32 to bf16, and it has neither threads
nor barriers.
"""

from __future__ import annotations

import os
from dataclasses import replace

import pytest
import torch
from torch import Tensor

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("run by test_interpreted.py", allow_module_level=True)

from pctrain_kernels.softmax import TorchSoftmax, softmax_of
from pctrain_kernels.triton_softmax import TritonSoftmax
from tests.helpers.kernel_inputs import (
    LOGPROB_TOLERANCE,
    relative,
)
from tests.helpers.triton_cases import (
    BLOCK,
    BLOCKS,
    Case,
    check,
    check_beyond_two_to_the_31,
    check_confident,
    name_of,
    pairwise,
)

SOFTMAX_CASES = pairwise(
    {
        "dtypes": [
            (torch.float32, torch.float32),
            (torch.float32, torch.bfloat16),
            (torch.float32, torch.float16),
            (torch.float16, torch.float16),
            (torch.bfloat16, torch.bfloat16),
        ],
        "vocab": [1, 127, 1000, 1003, 4096],
        "tokens": [0, 1, 17, 32],
        "temperature": [1.0, 0.6, 1.7],
        "upstream": ["logprob alone", "logprob", "entropy", "both"],
        "layout": ["contiguous", "padded", "sliced"],
    }
)


@pytest.mark.parametrize("options", SOFTMAX_CASES, ids=name_of)
def test_statistics_and_gradient_are_those_of_float64(options: dict) -> None:
    (dtype, gradient), rest = options["dtypes"], {name: value for name, value in options.items() if name != "dtypes"}
    check(Case(dtype=dtype, gradient=gradient, **rest))


LARGE = Case(gradient=torch.bfloat16, vocab=152064, tokens=2, shards=(1, 70000))


@pytest.mark.parametrize(
    "case",
    [
        LARGE,
        replace(LARGE, dtype=torch.bfloat16, shards=(), temperature=0.7),
        BLOCKS,
        replace(BLOCKS, gradient=torch.float32, upstream="logprob alone"),
        replace(BLOCKS, gradient=torch.float16, temperature=0.6),
        replace(BLOCKS, dtype=torch.float16, gradient=torch.float16),
    ],
)
def test_rows_of_many_blocks(case: Case) -> None:
    check(case)


@pytest.mark.parametrize("shards", [(50,), (1, 126), (40, 40), (0, 60), (60, 127), (30, 41, 91)])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_shards_with_targets_on_their_edges(shards: tuple[int, ...], temperature: float) -> None:
    check(Case(shards=shards, tokens=8, temperature=temperature, layout="sliced"))


def test_a_target_in_no_shard_is_in_no_column() -> None:
    logits = torch.randn(4, 100)
    for column in (-1, 100, 5000, -(2**40), 2**40):
        block = TritonSoftmax(logits.clone(), torch.full((4,), column), 1.0, True)
        row = block.statistics()
        assert (row.target == -torch.inf).all()
        torch.testing.assert_close(row.rest, (logits - logits.amax(1, keepdim=True)).exp().sum(1))
        # Another shard holds the target and adds nothing else here.
        row = row._replace(target=torch.zeros(4))
        gradient = block.gradient(row, torch.ones(4), None, torch.float32)
        torch.testing.assert_close(gradient, -(logits - row.max[:, None]).exp() / row.sum()[:, None])


def offset_case(case: Case) -> tuple[Tensor, Tensor]:
    """Check logits near 1e4, on a grid that fp32 holds there."""
    logits, target = case.values()
    return (logits * 256).round() / 256 + 1e4, target


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_logits_offset_by_ten_thousand(temperature: float) -> None:
    for case in (Case(temperature=temperature), replace(BLOCKS, gradient=torch.float32, temperature=temperature)):
        check(case, offset_case(case))


def test_a_confident_target_keeps_the_precision_of_its_gradient() -> None:
    check_confident()


@pytest.mark.parametrize("want_entropy", [False, True])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("place", [0, 3, BLOCK + 5])
@pytest.mark.parametrize("is_target", [False, True])
def test_non_finite_logits_stay_non_finite(want_entropy: bool, bad: float, place: int, is_target: bool) -> None:
    logits = torch.randn(2, BLOCK + 100)
    logits[1, place] = bad
    target = torch.tensor([place, place if is_target else 7])
    block = TritonSoftmax(logits, target, 1.0, want_entropy)
    row = block.statistics()
    values = (row.logprob(), row.entropy()) if want_entropy else (row.logprob(),)
    for value in values:
        assert value[0].isfinite() and not value[1].isfinite()
    gradient = block.gradient(row, torch.ones(2), torch.ones(2) if want_entropy else None, torch.bfloat16)
    assert gradient[0].isfinite().all() and not gradient[1].isfinite().all()


@pytest.mark.parametrize("masked", [slice(0, BLOCK + 2), slice(5, 9), slice(BLOCK - 1, None)])
def test_columns_of_probability_zero(masked: slice) -> None:
    """Logits of -inf leave the log-prob to the others; the entropy is NaN (0 times -inf), as in the definition."""
    logits = torch.randn(3, BLOCK + 100)
    logits[:2, masked] = -torch.inf
    target = torch.tensor([BLOCK + 9 if masked.start == 0 else 3, masked.start, 4])
    inputs = logits.double().requires_grad_()
    want = torch.log_softmax(inputs, 1).gather(1, target[:, None]).squeeze(1)
    block = TritonSoftmax(logits.clone(), target, 1.0, False)
    row = block.statistics()
    torch.testing.assert_close(row.logprob().double(), want, rtol=0, atol=LOGPROB_TOLERANCE)
    assert want[1] == -torch.inf
    (want_gradient,) = torch.autograd.grad(want[[0, 2]].sum(), inputs)
    got = block.gradient(row, torch.ones(3), None, torch.float32)
    assert relative(got[[0, 2]], want_gradient[[0, 2]]) < 1e-6 and (got[0, masked] == 0).all()
    entropy = TritonSoftmax(logits.clone(), target, 1.0, True).statistics().entropy()
    assert entropy[:2].isnan().all() and entropy[2].isfinite()


def test_a_row_of_minus_infinity_has_no_softmax() -> None:
    for want_entropy in (False, True):
        row = TritonSoftmax(torch.full((1, BLOCK + 5), -torch.inf), torch.tensor([3]), 1.0, want_entropy).statistics()
        assert row.max == -torch.inf and row.rest.isnan() and row.logprob().isnan()


def test_the_lowest_of_numbers_is_a_logit_like_others() -> None:
    lowest = torch.finfo(torch.float32).min
    check(Case(vocab=BLOCK + 7, tokens=1), (torch.full((1, BLOCK + 7), lowest), torch.tensor([4])))
    logits = torch.full((1, BLOCK + 7), lowest)
    logits[0, -1] = -lowest  # their difference exceeds the largest number
    row = TritonSoftmax(logits, torch.tensor([BLOCK + 6]), 1.0, False).statistics()
    assert row.logprob() == 0


def test_offsets_beyond_two_to_the_31_elements() -> None:
    check_beyond_two_to_the_31()


def test_softmax_of_chooses_the_kernels() -> None:
    logits, column = torch.randn(2, 9), torch.tensor([1, 2])
    options = {"temperature": 1.0, "want_entropy": True, "sharded": False}

    def no_scratch() -> Tensor:
        raise AssertionError("memory was asked for")

    assert isinstance(softmax_of(logits, column, scratch=no_scratch, **options), TritonSoftmax)
    assert isinstance(
        softmax_of(logits.double(), column, scratch=lambda: torch.empty(2, 9).double(), **options), TorchSoftmax
    )


@pytest.mark.parametrize(
    "change, message",
    [
        ({"logits": torch.zeros(40, 3).t()}, "contiguous columns"),
    ],
)
def test_mismatched_arguments_are_refused(change: dict, message: str) -> None:
    options = {"column": torch.zeros(3, dtype=torch.int64), "temperature": 1.0, "want_entropy": False} | change

    def value_and_gradient() -> None:
        block = TritonSoftmax(**options)
        block.gradient(block.statistics(), torch.ones(3), None, torch.float32)

    with pytest.raises(ValueError, match=message):
        value_and_gradient()
