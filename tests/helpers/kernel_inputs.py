"""Inputs, tolerances and comparisons that the tests of the kernels share."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from pctrain_kernels import linear_logprob_entropy, reference

# fp32 rounding of short dot products and of logits near 10: a few units of 6e-8 of the largest value or norm.
LOGPROB_TOLERANCE = 1e-5
GRADIENT_TOLERANCE = 1e-6
VALUE_TOLERANCE = 2e-6  # relative to the sum of magnitudes: fp32 rounding of each term


def make_inputs(
    tokens: int, vocab: int, width: int = 24, *, seed: int = 0, ignored: float = 0.3, valid: int | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Return fp32 leaves hidden [T, H] and weight [V, H], and target [T] less than `valid` with a share of -100."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(tokens, width, generator=generator).requires_grad_()
    weight = (0.5 * torch.randn(vocab, width, generator=generator)).requires_grad_()
    target = torch.randint(valid or vocab, (tokens,), generator=generator)
    target[torch.rand(tokens, generator=generator) < ignored] = -100
    return hidden, weight, target


def exact_logits(tokens: int, vocab: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return inputs on a grid so coarse that fp32 holds every logit exactly: errors are the softmax's own."""
    hidden, weight, target = make_inputs(tokens, vocab, ignored=0)
    return (hidden.detach() * 4).round() / 4, (weight.detach() * 4).round() / 4, target


def relative(got: Tensor, want: Tensor) -> float:
    """Return the norm of the difference divided by the norm of the expected value."""
    assert torch.isfinite(got).all()
    return float((got.double() - want).norm() / want.norm().clamp_min(1e-30)) if want.numel() else 0.0


def double(*tensors: Tensor) -> list[Tensor]:
    return [tensor.detach().double().requires_grad_() for tensor in tensors]


def clipped_policy(logprob: Tensor, entropy: Tensor, streams: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    """Compute a clipped ratio with an entropy bonus and a KL penalty, as a user may write it."""
    ratio = (logprob - streams["old_logprob"]).exp()
    advantage = streams["advantage"]
    surrogate = torch.minimum(ratio * advantage, ratio.clamp(0.8, 1.28) * advantage)
    log_ref = streams["ref_logprob"] - logprob
    loss = -surrogate + 0.1 * (log_ref.exp() - log_ref - 1) - 0.05 * entropy
    return loss, {"ratio": ratio, "entropy": entropy, "clipped": ((ratio < 0.8) | (ratio > 1.28)).float()}


def make_streams(
    hidden: Tensor, weight: Tensor, target: Tensor, *, seed: int = 3, **options: Any
) -> tuple[dict[str, Tensor], Tensor]:
    """Return streams near the current policy, so that only some ratios are clipped, and weights with zeros."""
    generator = torch.Generator().manual_seed(seed)
    logprob = reference.linear_logprob_entropy(hidden, weight, target, **options)[0].detach()
    noise = torch.randn(3, target.shape[0], generator=generator) * 0.3
    streams = {"old_logprob": logprob + noise[0], "ref_logprob": logprob + noise[1], "advantage": noise[2] * 4}
    return streams, torch.randint(3, target.shape, generator=generator).float()


class Tensors(TorchDispatchMode):
    """Record every operation below autograd: sizes of the new tensors, and the matrix products."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: set[int] = set()
        self.products = 0

    @property
    def largest(self) -> int:
        return max(self.sizes, default=0)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.products += func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm_)
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(tensor, torch.Tensor):
                self.sizes.add(tensor.numel())
        return result


def compare(
    hidden: Tensor, weight: Tensor, target: Tensor, *, upstream: str = "both", chunk: int | None = None, **options: Any
) -> None:
    """Return values and gradients of the fused operation and of the definition."""
    generator = torch.Generator().manual_seed(1)
    signs = torch.randn(2, target.shape[0], generator=generator, dtype=torch.float64)
    signs[0 if upstream == "entropy" else 1] *= upstream == "both"
    want_inputs = double(hidden, weight)
    want = reference.linear_logprob_entropy(want_inputs[0], want_inputs[1], target, **options)
    want_gradients = torch.autograd.grad(
        sum((sign * value).sum() for sign, value in zip(signs, want, strict=True)), want_inputs
    )
    got = linear_logprob_entropy(hidden, weight, target, chunk_tokens=chunk, **options)
    got_gradients = torch.autograd.grad(
        sum((sign.float() * value).sum() for sign, value in zip(signs, got, strict=True)), (hidden, weight)
    )
    for got_value, want_value in zip(got, want, strict=True):
        assert got_value.dtype == torch.float32
        torch.testing.assert_close(got_value.double(), want_value, rtol=0, atol=LOGPROB_TOLERANCE)
        assert (got_value[target == -100] == 0).all()
    for got_gradient, want_gradient in zip(got_gradients, want_gradients, strict=True):
        assert relative(got_gradient, want_gradient) < GRADIENT_TOLERANCE


def check_padding_columns_take_no_part() -> None:
    """Compare with the definition when the weight has rows past the vocabulary that would dominate every softmax."""
    hidden, weight, target = make_inputs(17, 70, valid=61)
    with torch.no_grad():
        weight[61:] = 1e4
    compare(hidden, weight, target, valid_vocab=61)
    logprob, _ = linear_logprob_entropy(hidden, weight, target, valid_vocab=61)
    (gradient,) = torch.autograd.grad(logprob.sum(), weight)
    assert (gradient[61:] == 0).all() and (gradient[:61] != 0).any()
