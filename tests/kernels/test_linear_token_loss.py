"""`linear_token_loss` against autograd through its float64 definition, on one process."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

import pctrain_kernels
from pctrain_kernels import linear_token_loss, reference
from tests.helpers.kernel_inputs import (
    GRADIENT_TOLERANCE,
    VALUE_TOLERANCE,
    Tensors,
    clipped_policy,
    double,
    exact_logits,
    make_inputs,
    make_streams,
    relative,
)


def nll(logprob, entropy, streams):
    return -logprob, {}


def shaped_expert(logprob, entropy, streams):
    p = logprob.exp()
    return -p / (p + 0.1) * streams["advantage"] * entropy, {"entropy": entropy}


def only_entropy(logprob, entropy, streams):
    return -entropy, {}


TOKEN_LOSSES = {loss.__name__: loss for loss in (nll, clipped_policy, shaped_expert, only_entropy)}


def both(hidden, weight, target, token_loss, streams, token_weight, *, upstream: float = 1.0, fused=None, **options):
    """Return (loss, metrics, gradients) of the fused operation in fp32 and of the definition in float64."""
    got_loss, got_metrics = linear_token_loss(
        hidden,
        weight,
        target,
        token_loss,
        streams=streams,
        denom=37.0,
        token_weight=token_weight,
        **options,
        **(fused or {}),
    )
    got = torch.autograd.grad(got_loss * upstream, (hidden, weight))
    inputs = double(hidden, weight)
    want_loss, want_metrics = reference.linear_token_loss(
        *inputs,
        target,
        token_loss,
        streams={name: stream.double() for name, stream in streams.items()},
        denom=37.0,
        token_weight=None if token_weight is None else token_weight.double(),
        **options,
    )
    return (got_loss, got_metrics, got), (want_loss, want_metrics, torch.autograd.grad(want_loss * upstream, inputs))


def assert_agree(got, want, scale: float) -> None:
    assert got[0].dtype == torch.float32 and got[0].shape == ()
    torch.testing.assert_close(got[0].double(), want[0], rtol=VALUE_TOLERANCE, atol=VALUE_TOLERANCE * scale)
    assert got[1].keys() == want[1].keys()
    for name, value in got[1].items():
        assert value.dtype == torch.float32 and value.shape == () and not value.requires_grad
        torch.testing.assert_close(value.double(), want[1][name], rtol=VALUE_TOLERANCE, atol=VALUE_TOLERANCE * scale)
    for got_gradient, want_gradient in zip(got[2], want[2], strict=True):
        assert relative(got_gradient, want_gradient) < GRADIENT_TOLERANCE


@pytest.mark.parametrize("token_loss", TOKEN_LOSSES.values(), ids=TOKEN_LOSSES)
@pytest.mark.parametrize("chunk", [None, 1, 7, 33])
def test_any_loss_is_differentiated_as_by_autograd(token_loss, chunk) -> None:
    inputs = make_inputs(33, 101, valid=97)
    streams, token_weight = make_streams(*inputs, valid_vocab=97, temperature=0.7)
    got, want = both(
        *inputs,
        token_loss,
        streams,
        token_weight,
        upstream=-2.5,
        fused={"chunk_tokens": chunk},
        valid_vocab=97,
        temperature=0.7,
    )
    assert_agree(got, want, scale=10)
    if token_loss is clipped_policy:
        assert 0 < want[1]["clipped"] < token_weight.sum()


@settings(max_examples=25, deadline=None)
@given(
    tokens=st.integers(0, 40),
    vocab=st.integers(2, 200),
    seed=st.integers(0, 1000),
    ignored=st.sampled_from([0.0, 0.5, 1.1]),
    weighted=st.booleans(),
    chunk=st.none() | st.integers(1, 50),
    temperature=st.sampled_from([1.0, 0.7]),
)
def test_any_shape_agrees_with_the_definition(tokens, vocab, seed, ignored, weighted, chunk, temperature) -> None:
    inputs = [tensor.detach().double() for tensor in make_inputs(tokens, vocab, seed=seed, ignored=ignored)]
    hidden, weight, target = inputs[0].requires_grad_(), inputs[1].requires_grad_(), inputs[2].long()
    streams, token_weight = make_streams(hidden, weight, target, temperature=temperature)
    options = {
        "streams": {name: stream.double() for name, stream in streams.items()},
        "denom": torch.tensor(11.0),
        "token_weight": token_weight.double() if weighted else None,
        "temperature": temperature,
    }
    got, got_metrics = linear_token_loss(hidden, weight, target, clipped_policy, chunk_tokens=chunk, **options)
    want, want_metrics = reference.linear_token_loss(hidden, weight, target, clipped_policy, **options)
    # In float64 the algorithm itself is compared, without rounding.
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(got_metrics, want_metrics, rtol=1e-12, atol=1e-12)
    gradients = torch.autograd.grad(got, (hidden, weight))
    torch.testing.assert_close(gradients, torch.autograd.grad(want, (hidden, weight)), rtol=1e-11, atol=1e-12)


def test_agrees_with_cross_entropy_of_torch() -> None:
    hidden, weight, target = make_inputs(33, 101)
    want = F.cross_entropy(hidden @ weight.T, target, reduction="sum") / 20
    got, metrics = linear_token_loss(hidden, weight, target, nll, streams={}, denom=20, want_entropy=False)
    assert metrics == {} and got.dtype == torch.float32
    same = linear_token_loss(
        hidden, weight, target, nll, streams={}, denom=torch.tensor(20, dtype=torch.float64), want_entropy=False
    )[0]
    assert same.dtype == torch.float32 and same == got
    torch.testing.assert_close(got, want, rtol=1e-6, atol=0)
    gradients = [torch.autograd.grad(loss, (hidden, weight)) for loss in (got, want)]
    for got_gradient, want_gradient in zip(*gradients, strict=True):
        assert relative(got_gradient, want_gradient.double()) < 2 * GRADIENT_TOLERANCE  # both are rounded


def test_confident_targets_keep_the_relative_precision_of_their_gradient() -> None:
    hidden, weight, target = exact_logits(16, 40)
    weight[:, :1], hidden[:, :1] = 0, 0
    hidden[:, 0], weight[5, 0], target[:] = 8, 2.5, 5
    got, want = both(hidden.requires_grad_(), weight.requires_grad_(), target, nll, {}, None)
    for got_row, want_row in zip(got[2][0], want[2][0], strict=True):
        assert relative(got_row, want_row) < GRADIENT_TOLERANCE


def test_bfloat16_gradients() -> None:
    hidden, weight, target = make_inputs(33, 101)
    streams, token_weight = make_streams(hidden, weight, target)
    hidden, weight = (tensor.detach().bfloat16().requires_grad_() for tensor in (hidden, weight))
    got, want = both(hidden, weight, target, clipped_policy, streams, token_weight)
    for got_gradient, want_gradient in zip(got[2], want[2], strict=True):
        assert got_gradient.dtype == torch.bfloat16
        assert relative(got_gradient, want_gradient) < 2**-8  # one rounding of the result to bf16
    main_grad = torch.zeros(101, 24)
    linear_token_loss(
        hidden,
        weight,
        target,
        clipped_policy,
        streams=streams,
        denom=37.0,
        token_weight=token_weight,
        grad_weight_out=main_grad,
    )
    assert relative(main_grad, want[2][1]) < GRADIENT_TOLERANCE  # not rounded at all


@pytest.mark.parametrize("tokens", [0, 1, 17])
@pytest.mark.parametrize("grad", [True, False])
def test_nothing_labelled_gives_exact_zeros(tokens: int, grad: bool) -> None:
    hidden, weight, target = make_inputs(tokens, 30, ignored=1.1)
    streams, _ = make_streams(hidden, weight, target)
    with torch.set_grad_enabled(grad):
        loss, metrics = linear_token_loss(hidden, weight, target, clipped_policy, streams=streams, denom=5)
    assert loss == 0 and metrics.keys() == {"ratio", "entropy", "clipped"} and not any(metrics.values())
    if grad:
        loss.backward()
        assert not hidden.grad.any() and not weight.grad.any()


def test_only_labelled_rows_reach_the_loss() -> None:
    hidden, weight, target = make_inputs(40, 30)
    seen = []

    def spy(logprob, entropy, streams):
        assert not (logprob.requires_grad and logprob.grad_fn) and not streams["position"].requires_grad
        seen.append(streams["position"])
        return -logprob, {}

    linear_token_loss(hidden, weight, target, spy, streams={"position": torch.arange(40.0)}, denom=1, chunk_tokens=8)
    assert len(seen) > 1 and torch.equal(torch.cat(seen), (target != -100).nonzero().squeeze(1).float())


@pytest.mark.parametrize("zero_out_wgrad", [False, True])
def test_grad_weight_out_is_filled_in_forward(zero_out_wgrad: bool) -> None:
    hidden, weight, target = make_inputs(40, 50, valid=47)
    streams, token_weight = make_streams(hidden, weight, target)
    options = {"streams": streams, "token_weight": token_weight, "denom": 13, "valid_vocab": 47, "chunk_tokens": 9}
    want = torch.autograd.grad(
        linear_token_loss(hidden, weight, target, clipped_policy, **options)[0], (hidden, weight)
    )
    weight.zero_out_wgrad = zero_out_wgrad
    main_grad = torch.zeros_like(weight)
    half = len(target) // 2
    for rows in (slice(half), slice(half, None)):  # two micro-batches
        pieces = options | {
            "streams": {name: stream[rows] for name, stream in streams.items()},
            "token_weight": token_weight[rows],
        }
        loss, _ = linear_token_loss(
            hidden[rows], weight, target[rows], clipped_policy, grad_weight_out=main_grad, **pieces
        )
        loss.backward()
    torch.testing.assert_close(main_grad, want[1], rtol=1e-5, atol=1e-7)  # the order of an fp32 sum
    torch.testing.assert_close(hidden.grad, want[0])
    assert weight.grad_added_to_main_grad and weight.grad.shape == weight.shape
    assert not zero_out_wgrad or not weight.grad.any()


def test_grad_weight_out_refuses_a_scaled_loss() -> None:
    hidden, weight, target = make_inputs(8, 50)
    loss, _ = linear_token_loss(
        hidden, weight, target, nll, streams={}, denom=1, grad_weight_out=torch.zeros_like(weight)
    )
    with pytest.raises(RuntimeError, match="upstream gradient 1"):
        (loss * 2).backward()


def test_without_grad_mode_there_is_no_graph_no_write_and_one_product() -> None:
    hidden, weight, target = make_inputs(40, 50)
    streams, token_weight = make_streams(hidden, weight, target)
    options = {"streams": streams, "token_weight": token_weight, "denom": 13, "chunk_tokens": 40}
    want, want_metrics = linear_token_loss(hidden, weight, target, clipped_policy, **options)
    main_grad = torch.zeros_like(weight)
    with torch.no_grad(), Tensors() as seen:
        loss, metrics = linear_token_loss(hidden, weight, target, clipped_policy, grad_weight_out=main_grad, **options)
    assert seen.products == 1 and loss.grad_fn is None and not main_grad.any()
    torch.testing.assert_close((loss, metrics), (want.detach(), want_metrics), rtol=1e-6, atol=1e-6)


def test_frozen_inputs_get_no_gradient() -> None:
    hidden, weight, target = make_inputs(40, 50)
    options = {"streams": {}, "denom": 13, "chunk_tokens": 40}
    want = torch.autograd.grad(linear_token_loss(hidden, weight, target, nll, **options)[0], (hidden, weight))
    with Tensors() as seen:
        linear_token_loss(hidden.detach(), weight, target, nll, **options)[0].backward()
        linear_token_loss(hidden, weight.detach(), target, nll, **options)[0].backward()
    assert torch.equal(hidden.grad, want[0]) and torch.equal(weight.grad, want[1])
    assert seen.products == 4  # forward and one gradient, twice


def test_the_logits_of_the_batch_never_exist_at_once() -> None:
    tokens, vocab, width = 2048, 16000, 64
    hidden = torch.randn(tokens, width, requires_grad=True)
    weight = torch.randn(vocab, width, requires_grad=True)
    target = torch.randint(vocab, (tokens,))
    with Tensors() as seen:
        loss, _ = linear_token_loss(hidden, weight, target, nll, streams={}, denom=tokens)
        loss.backward()
    assert seen.products % 3 == 0  # three products per chunk, forward and backward together
    assert (
        vocab * width < seen.largest <= 2**25 // 4
    )  # the chunk's logits are seen, and are within their budget; T * V is 33 million
    assert weight.grad is not None


@pytest.mark.parametrize(
    "change, message",
    [
        ({"streams": {"advantage": torch.zeros(7)}}, r"stream 'advantage' of shape \[8\]"),
        ({"token_weight": torch.zeros(8, 1)}, "token_weight"),
        ({"denom": 0}, "denom"),
        ({"token_loss": lambda logprob, entropy, streams: (-logprob.sum(), {})}, "one value per token: the loss"),
        ({"token_loss": lambda logprob, entropy, streams: (-logprob, {"kl": entropy.mean()})}, "kl"),
        ({"token_loss": lambda logprob, entropy, streams: (torch.zeros_like(logprob), {})}, "nothing to differentiate"),
    ],
)
def test_mismatched_arguments_are_refused(change: dict, message: str) -> None:
    hidden, weight, target = make_inputs(8, 50)
    call = {"hidden": hidden, "weight": weight, "target": target, "token_loss": nll, "streams": {}, "denom": 1.0}
    with pytest.raises(ValueError, match=message):
        linear_token_loss(**(call | change))


def test_the_package_needs_torch_alone_and_triton_in_files_named_after_it() -> None:
    for path in Path(pctrain_kernels.__file__).parent.glob("*.py"):
        allowed = (
            r"(__future__|torch|pctrain_kernels|collections|dataclasses|os|typing"
            + "|triton" * path.name.startswith("triton_")
        )
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) else []
            for name in names:
                assert re.match(allowed + r")(\.|$)", name), f"{path}: {name}"


def with_maxima(logprob, entropy, streams):
    """Return losses that report a maximum among their metrics, and the same values as a mean."""
    return -logprob, {"nll": -logprob.detach(), "max/nll": -logprob.detach(), "max/signed": streams["signed"]}


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("chunk", [1, 7, None])
def test_maxima_are_over_tokens_of_weight_above_0(chunk, grad) -> None:
    hidden, weight, target = make_inputs(33, 101)
    signed = -1 - torch.rand(33)  # all below 0: a maximum that began at 0 would show
    token_weight = torch.full((33,), 3.0)
    labelled = (target != -100).nonzero().squeeze(1)
    signed[labelled[0]], token_weight[labelled[0]] = 9.0, 0.0
    options = {"streams": {"signed": signed}, "denom": 2.0, "token_weight": token_weight}
    want = reference.linear_token_loss(hidden, weight, target, with_maxima, **options)[1]
    with torch.set_grad_enabled(grad):
        got = linear_token_loss(hidden, weight, target, with_maxima, chunk_tokens=chunk, **options)[1]
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
    assert got["max/signed"] == signed[labelled[1:]].max() < 0
    assert got["max/nll"] < got["nll"]  # one of them is not a sum


def test_the_maximum_over_no_token_is_minus_infinity() -> None:
    hidden, weight, target = make_inputs(7, 30, ignored=1.1)
    metrics = linear_token_loss(hidden, weight, target, with_maxima, streams={"signed": torch.ones(7)}, denom=1)[1]
    assert metrics["max/nll"] == metrics["max/signed"] == -torch.inf and metrics["nll"] == 0
