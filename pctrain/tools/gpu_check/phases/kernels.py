"""The kernels on real sizes against their definition in float64.

Every case runs twice, the second time in poisoned memory (uninitialized tensors are NaN): both must have the same bits.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from pctrain.tools.gpu_check.check import Check
from pctrain_kernels import linear_logprob_entropy, linear_token_loss, reference, vocab_parallel_logprob_entropy

# Norm of the difference over the norm of the float64 result. Values: fp32 rounding of logits near 10. Gradients: the
# same, or one rounding to bf16 at the store, and for dX and dW of the head another one.
VALUE = 1e-5
GRADIENT = {torch.float32: 1e-5, torch.bfloat16: 8e-3}
GUARD = 77.0
IGNORED = -100
VOCABULARIES = (151643, 152064, 32003)
CPU_VOCABULARIES = (127, 304, 1003)

Results = dict[str, Tensor]


@dataclass(frozen=True)
class Case:
    """Sizes and options of one comparison."""

    dtype: torch.dtype
    vocab: int
    tokens: int
    width: int
    temperature: float
    device: torch.device

    def __str__(self) -> str:
        dtype = {torch.float32: "fp32", torch.bfloat16: "bf16"}[self.dtype]
        return f"{dtype}, V {self.vocab}, temperature {self.temperature:g}"

    def targets(self) -> Tensor:
        """Return targets, three in ten of them ignored; the first and the last column occur."""
        generator = torch.Generator().manual_seed(self.vocab)
        target = torch.randint(self.vocab, (self.tokens,), generator=generator)
        target[torch.rand(self.tokens, generator=generator) < 0.3] = IGNORED
        target[0], target[1] = 0, self.vocab - 1
        return target.to(self.device)

    def random(self, *shape: int, std: float, seed: int) -> Tensor:
        """Return normal values in the case's dtype."""
        generator = torch.Generator(self.device).manual_seed(seed)
        return (torch.randn(*shape, generator=generator, device=self.device) * std).to(self.dtype)


@dataclass(frozen=True)
class Operation:
    """An operation of the package, and its definition in float64, on the tensors of a case."""

    compute: Callable[[Case], Results]
    expected: Callable[[Case], Results]


class Poisoned(TorchDispatchMode):
    """Fill every uninitialized floating-point tensor with NaN."""

    EMPTY = ("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided")

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call the operation, and fill what it leaves uninitialized."""
        result = func(*args, **(kwargs or {}))
        if func.overloadpacket.__name__ in self.EMPTY and result.is_floating_point():
            result.fill_(math.nan)
        return result


def run(check: Check) -> None:
    """Compare every operation over dtypes, vocabularies and temperatures."""
    device = torch.device("cuda" if check.gpu else "cpu")
    vocabularies = (VOCABULARIES if check.gpu else CPU_VOCABULARIES)[: 1 if check.quick else None]
    tokens, width = (384, 256) if check.gpu else (8, 24)
    for dtype in (torch.bfloat16, torch.float32):
        for index, vocab in enumerate(vocabularies):
            case = Case(dtype, vocab, tokens, width, 0.7 if index % 2 else 1.0, device)
            for name, operation in OPERATIONS.items():
                _compare(check, name, case, operation)


def _compare(check: Check, name: str, case: Case, operation: Operation) -> None:
    got, want = operation.compute(case), operation.expected(case)
    for piece, value in want.items():
        bound = VALUE
        if "grad" in piece:
            bound = GRADIENT[case.dtype] * (2 if got[piece].dtype == torch.bfloat16 else 1)
        error = (got[piece].double() - value).norm() / value.norm()
        check.measure(f"{name}, {piece}: {case}", float(error), "relative error", at_most=bound)
    with Poisoned():
        again = operation.compute(case)
    differs = [piece for piece in got if not torch.equal(got[piece], again[piece])]
    check.expect(f"{name}, same bits in poisoned memory: {case}", not differs, ", ".join(differs))


def _upstream(case: Case) -> tuple[Tensor, Tensor]:
    signs = torch.randn(2, case.tokens, generator=torch.Generator().manual_seed(1)).to(case.device)
    return signs[0], signs[1]


def _differentiated(values: tuple[Tensor, Tensor], leaves: dict[str, Tensor], case: Case) -> Results:
    """Return log-prob, entropy, and the leaves' gradients by name."""
    upstream = [sign.to(value.dtype) for sign, value in zip(_upstream(case), values, strict=True)]
    gradients = torch.autograd.grad(values, [*leaves.values()], upstream)
    named = {f"grad {name}": gradient for name, gradient in zip(leaves, gradients, strict=True)}
    return {"logprob": values[0].detach(), "entropy": values[1].detach(), **named}


# ---- from logits -----------------------------------------------------------------------------------------------------


def _logits(case: Case) -> Tensor:
    return case.random(case.tokens, case.vocab, std=3, seed=2)


def from_logits(case: Case) -> Results:
    """Compute log-prob, entropy and the gradient, which is written over a strided block of logits."""
    memory = torch.full((case.tokens, case.vocab + 24), GUARD, dtype=case.dtype, device=case.device)
    block = memory[:, 8 : 8 + case.vocab]
    leaf = block.copy_(_logits(case)).detach().requires_grad_()
    values = vocab_parallel_logprob_entropy(leaf, case.targets(), temperature=case.temperature, inplace_backward=True)
    results = _differentiated(values, {"logits": leaf}, case)
    if results["grad logits"].data_ptr() != block.data_ptr():
        raise RuntimeError("the gradient is not in the memory of the logits, as inplace_backward asks")
    guards = torch.cat([memory[:, :8], memory[:, 8 + case.vocab :]], 1)
    if not bool((guards == GUARD).all()):
        raise RuntimeError("the gradient kernel wrote outside of its columns")
    return results


def exact_from_logits(case: Case) -> Results:
    """Return the definition's values and gradient in float64."""
    leaf = _logits(case).double().requires_grad_()
    values = reference.vocab_parallel_logprob_entropy(leaf, case.targets(), temperature=case.temperature)
    return _differentiated(values, {"logits": leaf}, case)


# ---- from hidden states ----------------------------------------------------------------------------------------------


def _head(case: Case) -> dict[str, Tensor]:
    return {
        "hidden": case.random(case.tokens, case.width, std=1, seed=3).requires_grad_(),
        "weight": case.random(case.vocab, case.width, std=3 / case.width**0.5, seed=4).requires_grad_(),
    }


def from_hidden(case: Case) -> Results:
    """Compute log-prob, entropy and both gradients from hidden states, in several chunks."""
    leaves = _head(case)
    values = linear_logprob_entropy(
        **leaves, target=case.targets(), temperature=case.temperature, chunk_tokens=case.tokens // 3
    )
    return _differentiated(values, leaves, case)


def exact_from_hidden(case: Case) -> Results:
    """Return the definition's values and gradients in float64."""
    leaves = {name: leaf.detach().double().requires_grad_() for name, leaf in _head(case).items()}
    values = reference.linear_logprob_entropy(**leaves, target=case.targets(), temperature=case.temperature)
    return _differentiated(values, leaves, case)


def token_loss(case: Case) -> Results:
    """Compute a loss of log-prob and entropy, with dW added to a full precision buffer."""
    leaves = _head(case)
    upstream, entropy_upstream = _upstream(case)
    main_grad = torch.zeros(leaves["weight"].shape, device=case.device)
    loss, _ = linear_token_loss(
        **leaves,
        target=case.targets(),
        token_loss=lambda logprob, entropy, streams: (streams["a"] * logprob + streams["b"] * entropy, {}),
        streams={"a": upstream, "b": entropy_upstream},
        denom=1.0,
        temperature=case.temperature,
        chunk_tokens=case.tokens // 3,
        grad_weight_out=main_grad,
    )
    loss.backward()
    return {"loss": loss.detach(), "grad hidden": leaves["hidden"].grad, "grad main_grad": main_grad}


def exact_token_loss(case: Case) -> Results:
    """Return the definition's loss and gradients in float64."""
    want = exact_from_hidden(case)
    upstream, entropy_upstream = _upstream(case)
    loss = (upstream * want["logprob"] + entropy_upstream * want["entropy"]).sum()
    return {"loss": loss, "grad hidden": want["grad hidden"], "grad main_grad": want["grad weight"]}


OPERATIONS = {
    "vocab_parallel_logprob_entropy": Operation(from_logits, exact_from_logits),
    "linear_logprob_entropy": Operation(from_hidden, exact_from_hidden),
    "linear_token_loss": Operation(token_loss, exact_token_loss),
}
