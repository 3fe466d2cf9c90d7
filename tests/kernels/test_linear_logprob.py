"""`linear_logprob_entropy` against its float64 definition, on one process."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from pctrain_kernels import linear_logprob_entropy, reference
from tests.helpers.kernel_inputs import (
    GRADIENT_TOLERANCE,
    LOGPROB_TOLERANCE,
    check_padding_columns_take_no_part,
    compare,
    double,
    exact_logits,
    make_inputs,
    relative,
)


@pytest.mark.parametrize("upstream", ["logprob", "entropy", "both"])
@pytest.mark.parametrize("chunk", [None, 1, 7, 17])
@pytest.mark.parametrize("temperature", [1.0, 0.6, 1.7])
def test_values_and_gradients_are_those_of_the_definition(upstream: str, chunk: int | None, temperature: float) -> None:
    compare(*make_inputs(17, 101), upstream=upstream, chunk=chunk, temperature=temperature)


@settings(max_examples=30, deadline=None)
@given(
    tokens=st.integers(1, 40),
    vocab=st.integers(1, 300),
    padding=st.integers(0, 70),
    seed=st.integers(0, 1000),
    temperature=st.floats(0.3, 3),
    ignored=st.sampled_from([0.0, 0.5]),
    chunk=st.none() | st.integers(1, 50),
)
def test_any_shape_agrees_with_the_definition(tokens, vocab, padding, seed, temperature, ignored, chunk) -> None:
    hidden, weight, target = make_inputs(tokens, vocab + padding, seed=seed, ignored=ignored, valid=vocab)
    # A temperature of 0.3 makes logits and their rounding errors three times as large.
    options = {"valid_vocab": vocab, "temperature": temperature}
    want = reference.linear_logprob_entropy(*double(hidden, weight), target, **options)
    got = linear_logprob_entropy(hidden, weight, target, chunk_tokens=chunk, **options)
    for got_value, want_value in zip(got, want, strict=True):
        torch.testing.assert_close(
            got_value.double(), want_value, rtol=0, atol=LOGPROB_TOLERANCE * max(1, 1 / temperature)
        )


def test_float64_inputs_are_computed_in_float64() -> None:
    hidden, weight, target = make_inputs(9, 40)
    inputs = double(hidden, weight)
    got = linear_logprob_entropy(*inputs, target, temperature=0.8, chunk_tokens=2)
    want = reference.linear_logprob_entropy(*inputs, target, temperature=0.8)
    for got_value, want_value in zip(got, want, strict=True):
        torch.testing.assert_close(got_value, want_value, rtol=1e-13, atol=1e-13)
    assert torch.autograd.gradcheck(lambda h, w: linear_logprob_entropy(h, w, target, chunk_tokens=2), inputs)


def test_bfloat16_inputs_are_computed_in_fp32() -> None:
    hidden, weight, target = make_inputs(17, 60)
    hidden, weight = (tensor.detach().bfloat16().requires_grad_() for tensor in (hidden, weight))
    want_inputs = double(hidden, weight)
    want = reference.linear_logprob_entropy(*want_inputs, target)
    got = linear_logprob_entropy(hidden, weight, target)
    torch.testing.assert_close(got[0].double(), want[0], rtol=0, atol=LOGPROB_TOLERANCE)
    torch.testing.assert_close(got[1].double(), want[1], rtol=0, atol=LOGPROB_TOLERANCE)
    (got[0] + got[1]).sum().backward()
    (want[0] + want[1]).sum().backward()
    for tensor, want_tensor in zip((hidden, weight), want_inputs, strict=True):
        assert tensor.grad.dtype == torch.bfloat16
        assert (
            relative(tensor.grad, want_tensor.grad) < 2**-8
        )  # one rounding of the result to bf16: half a unit of 2^-8


def test_padding_columns_take_no_part() -> None:
    check_padding_columns_take_no_part()


def test_logits_offset_by_ten_thousand() -> None:
    hidden, weight, target = exact_logits(17, 101)
    hidden[:, 0], weight[:, 0] = 100, 100
    weight.requires_grad_()
    want_inputs = double(hidden, weight)
    want = reference.linear_logprob_entropy(*want_inputs, target)
    got = linear_logprob_entropy(hidden, weight, target)
    for got_value, want_value in zip(got, want, strict=True):
        torch.testing.assert_close(got_value.double(), want_value, rtol=0, atol=LOGPROB_TOLERANCE)
    (want_gradient,) = torch.autograd.grad((want[0] - want[1]).sum(), want_inputs[1:])
    (got_gradient,) = torch.autograd.grad((got[0] - got[1]).sum(), weight)
    # Column 0 is 100 times sums that cancel to rounding errors: a relative error has no meaning there.
    assert relative(got_gradient[:, 1:], want_gradient[:, 1:]) < GRADIENT_TOLERANCE


def test_confident_target_keeps_the_relative_precision_of_its_gradient() -> None:
    hidden, weight, target = exact_logits(16, 40)
    weight[:, :4], hidden[:, :4] = 0, 0
    hidden[:, 0], weight[5, 0], target[:] = 8, 2.5, 5  # the target's logit is ahead by some 20
    hidden.requires_grad_(), weight.requires_grad_()
    want_inputs = double(hidden, weight)
    want, _ = reference.linear_logprob_entropy(*want_inputs, target)
    assert want.max() < 0 and want.exp().min() > 0.999
    want_gradients = torch.autograd.grad(want.sum(), want_inputs)
    got, _ = linear_logprob_entropy(hidden, weight, target)
    torch.testing.assert_close(got.double(), want, rtol=1e-6, atol=0)
    for row in range(16):
        got_row, want_row = torch.autograd.grad(got[row], hidden, retain_graph=True)[0][row], want_gradients[0][row]
        assert relative(got_row, want_row) < GRADIENT_TOLERANCE


@pytest.mark.parametrize("tokens", [0, 1, 17])
def test_nothing_labelled_gives_exact_zeros(tokens: int) -> None:
    hidden, weight, target = make_inputs(tokens, 30, ignored=1.1)
    logprob, entropy = linear_logprob_entropy(hidden, weight, target)
    assert logprob.shape == entropy.shape == (tokens,) and not logprob.any() and not entropy.any()
    (logprob.sum() + entropy.sum()).backward()
    assert not hidden.grad.any() and not weight.grad.any()


def test_without_entropy_the_logprob_is_the_same() -> None:
    hidden, weight, target = make_inputs(17, 101)
    logprob, entropy = linear_logprob_entropy(hidden, weight, target, want_entropy=False)
    assert entropy is None
    torch.testing.assert_close(logprob, linear_logprob_entropy(hidden, weight, target)[0], rtol=0, atol=0)
    want = torch.autograd.grad(linear_logprob_entropy(hidden, weight, target)[0].sum(), weight)[0]
    torch.testing.assert_close(torch.autograd.grad(logprob.sum(), weight)[0], want, rtol=0, atol=0)


@pytest.mark.parametrize("zero_out_wgrad", [False, True])
def test_grad_weight_out_accumulates_the_weight_gradient(zero_out_wgrad: bool) -> None:
    hidden, weight, target = make_inputs(17, 50, valid=47)
    want = torch.autograd.grad(
        linear_logprob_entropy(hidden, weight, target, valid_vocab=47)[0].mul(3).sum(), (hidden, weight)
    )
    weight.zero_out_wgrad = zero_out_wgrad
    main_grad = torch.ones_like(weight)
    logprob, _ = linear_logprob_entropy(hidden, weight, target, valid_vocab=47, grad_weight_out=main_grad)
    assert (main_grad == 1).all()
    for _ in range(2):
        logprob.mul(3).sum().backward(retain_graph=True)
    torch.testing.assert_close(main_grad, 1 + 2 * want[1], rtol=1e-6, atol=1e-5)  # 1 + x in fp32
    torch.testing.assert_close(hidden.grad, 2 * want[0])
    assert weight.grad_added_to_main_grad and weight.grad.shape == weight.shape
    assert not zero_out_wgrad or not weight.grad.any()


def test_without_grad_mode_there_is_no_graph_and_no_write() -> None:
    hidden, weight, target = make_inputs(17, 50)
    main_grad = torch.zeros_like(weight)
    with torch.no_grad():
        logprob, entropy = linear_logprob_entropy(hidden, weight, target, grad_weight_out=main_grad)
    assert logprob.grad_fn is None and entropy.grad_fn is None and not main_grad.any()


def test_only_what_requires_a_gradient_gets_one() -> None:
    hidden, weight, target = make_inputs(17, 50)
    linear_logprob_entropy(hidden.detach(), weight, target)[0].sum().backward()
    linear_logprob_entropy(hidden, weight.detach(), target)[0].sum().backward()
    want = torch.autograd.grad(linear_logprob_entropy(hidden, weight, target)[0].sum(), (hidden, weight))
    assert torch.equal(hidden.grad, want[0]) and torch.equal(weight.grad, want[1])


def test_non_finite_input_is_not_hidden() -> None:
    hidden, weight, target = make_inputs(8, 50, ignored=0)
    for bad in (torch.nan, torch.inf):
        broken = hidden.detach().clone()
        broken[3, 2] = bad
        logprob, entropy = linear_logprob_entropy(broken, weight, target)
        assert not logprob[3].isfinite() and not entropy[3].isfinite()
        assert logprob[:3].isfinite().all() and logprob[4:].isfinite().all()


def test_non_contiguous_inputs() -> None:
    hidden, weight, target = make_inputs(17, 50)
    wide_hidden, wide_weight = torch.randn(17, 60), torch.randn(60, 60)
    wide_hidden[:, 5:29], wide_weight[3:53, 7:31] = hidden.detach(), weight.detach()
    compare(wide_hidden[:, 5:29].requires_grad_(), wide_weight[3:53, 7:31].requires_grad_(), target)


def test_vocab_start_moves_the_targets() -> None:
    hidden, weight, target = make_inputs(17, 50, ignored=0)
    got, _ = linear_logprob_entropy(hidden, weight, target + 1000, vocab_start=1000, valid_vocab=1050)
    assert torch.equal(got, linear_logprob_entropy(hidden, weight, target)[0])


def test_agrees_with_cross_entropy_of_torch_and_transformers() -> None:
    hidden, weight, target = make_inputs(33, 101)
    logprob, _ = linear_logprob_entropy(hidden, weight, target)
    torch.testing.assert_close(
        -logprob, F.cross_entropy(hidden @ weight.T, target, reduction="none"), rtol=0, atol=LOGPROB_TOLERANCE
    )
    from transformers.loss.loss_utils import ForCausalLMLoss

    logits = (hidden @ weight.T)[None]
    want = ForCausalLMLoss(logits, None, 101, shift_labels=target[None], num_items_in_batch=20)
    torch.testing.assert_close(-logprob.sum() / 20, want, rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"hidden": torch.zeros(8, 23)}, "hidden"),
        ({"hidden": torch.zeros(8, 24, dtype=torch.float64)}, "one floating point dtype"),
        ({"target": torch.zeros(7, dtype=torch.int64)}, r"target int64 \[8\]"),
        ({"target": torch.zeros(8, dtype=torch.int32)}, "int32"),
        ({"temperature": 0.0}, "temperature"),
        ({"valid_vocab": 0}, "valid_vocab"),
        ({"chunk_tokens": 0}, "chunk_tokens"),
        ({"sequence_parallel": True}, "sequence_parallel"),
        ({"grad_weight_out": torch.zeros(50, 24, dtype=torch.bfloat16)}, "grad_weight_out"),
        ({"grad_weight_out": torch.zeros(50, 24), "weight": torch.zeros(50, 24)}, "does not require a gradient"),
    ],
)
def test_mismatched_arguments_are_refused(change: dict, message: str) -> None:
    hidden, weight, target = make_inputs(8, 50)
    with pytest.raises(ValueError, match=message):
        linear_logprob_entropy(**({"hidden": hidden, "weight": weight, "target": target} | change))


@pytest.mark.parametrize("bad", [50, -1])
def test_a_target_outside_the_vocabulary_is_refused(bad: int) -> None:
    hidden, weight, target = make_inputs(8, 60, valid=50)
    target[2] = bad
    with pytest.raises(RuntimeError, match=r"\[0, 50\)"):
        linear_logprob_entropy(hidden, weight, target, valid_vocab=50)
