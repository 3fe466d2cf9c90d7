"""`rows` of both operators: the caller's positions with a target, which the host then does not wait for."""

from __future__ import annotations

from unittest import mock

import pytest
import torch
from torch import Tensor

from pctrain_kernels import linear_logprob_entropy, linear_token_loss
from tests.helpers.kernel_inputs import make_inputs


def nll(logprob, entropy, streams):
    return -logprob, {}


def logprob_sum(hidden, weight, target, **options) -> Tensor:
    return sum(linear_logprob_entropy(hidden, weight, target, **options)).sum()


def loss(hidden, weight, target, **options) -> Tensor:
    return linear_token_loss(hidden, weight, target, nll, streams={}, denom=3.0, **options)[0]


OPERATORS = pytest.mark.parametrize("operator", [logprob_sum, loss])


@OPERATORS
@pytest.mark.parametrize("ignored", [0.0, 0.4, 1.1])
def test_rows_that_the_caller_knows_are_not_counted(operator, ignored: float) -> None:
    hidden, weight, target = make_inputs(40, 90, ignored=ignored)
    expected = operator(hidden, weight, target)
    want = torch.autograd.grad(expected, (hidden, weight))
    rows = (target != -100).nonzero().squeeze(1)
    with mock.patch.object(torch.Tensor, "nonzero", side_effect=AssertionError("waits for a GPU")):
        got = operator(hidden, weight, target, rows=rows)
        gradients = torch.autograd.grad(got, (hidden, weight))
    assert torch.equal(got, expected) and all(map(torch.equal, gradients, want))


@OPERATORS
@pytest.mark.parametrize("wrong", [[0, 2], [0, 1, 3], [0, 2, 2], [2, 0, 4], [0, 2, 3, 4]], ids=str)
def test_rows_without_a_target_are_refused(operator, wrong: list[int]) -> None:
    hidden, weight, target = make_inputs(5, 9, ignored=0)
    target[[1, 3]] = -100
    with pytest.raises(RuntimeError, match="rows are not the ascending positions"):
        operator(hidden, weight, target, rows=torch.tensor(wrong))
    operator(hidden, weight, target, rows=torch.tensor([0, 2, 4]))
    with pytest.raises(ValueError, match=r"expected rows int64 \[at most 5\]"):
        operator(hidden, weight, target, rows=torch.tensor([0, 2, 4], dtype=torch.int32))
