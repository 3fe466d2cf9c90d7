"""Builders of providers that several operations share."""

from __future__ import annotations

import os
from collections.abc import Callable

import torch
from harness import Results, Step
from problems import FromHidden, FromLogits
from torch import Tensor


def of_logits(function: Callable[..., tuple[Tensor, Tensor]]) -> Callable[[FromLogits], Step]:
    """Build a provider from function(logits, target) -> (logprob, entropy), with the problem's upstream gradients."""
    return lambda problem: _with_upstream(
        problem, "grad_logits", (problem.logits,), lambda: function(problem.logits, problem.target)
    )


def of_hidden(function: Callable[..., tuple[Tensor, Tensor]]) -> Callable[[FromHidden], Step]:
    """Build a provider from function(hidden, weight, target) -> (logprob, entropy), with the upstream gradients."""
    return lambda problem: _with_upstream(
        problem, "grad_hidden grad_weight", problem.leaves, lambda: function(*problem.leaves, problem.target)
    )


def _with_upstream(
    problem: FromLogits | FromHidden, names: str, leaves: tuple[Tensor, ...], call: Callable[[], tuple]
) -> Step:
    def step() -> Results:
        logprob, entropy = call()
        grads = torch.autograd.grad((logprob, entropy), leaves, (problem.upstream, problem.entropy_upstream))
        return {
            "logprob": logprob.detach(),
            "entropy": entropy.detach(),
            **dict(zip(names.split(), grads, strict=True)),
        }

    return step


def loss_of_hidden(function: Callable[..., Tensor]) -> Callable[[FromHidden], Step]:
    """Build a provider from function(hidden, weight, problem) -> scalar loss."""

    def build(problem: FromHidden) -> Step:
        def step() -> Results:
            loss = function(*problem.leaves, problem)
            grad_hidden, grad_weight = torch.autograd.grad(loss, problem.leaves)
            return {"loss": loss.detach(), "grad_hidden": grad_hidden, "grad_weight": grad_weight}

        return step

    return build


def compiled(function: Callable) -> Callable:
    """Return the function compiled by torch.compile, one graph for all shapes."""
    if os.environ.get("TORCHDYNAMO_DISABLE") == "1":
        raise RuntimeError("TORCHDYNAMO_DISABLE is set")
    torch._dynamo.config.fail_on_recompile_limit_hit = True  # otherwise it falls back to eager silently
    return torch.compile(function, dynamic=True)


def warm(step: Step) -> Step:
    """Call the step once, so that everything in it is compiled, and return it."""
    step()
    return step


def copy_floor(problem: FromLogits) -> Step:
    """Read the logits twice and write their gradient once: copy the whole, then half of it (read and written)."""
    logits = problem.logits.detach()
    whole = torch.empty_like(logits)
    half = logits[: logits.shape[0] // 2]

    def step() -> Results:
        whole.copy_(logits)
        whole[: half.shape[0]].copy_(half)
        return {}

    return step


def product_floor(products: int) -> Callable[[FromHidden], Step]:
    """Compute the bare products: logits (`products` - 2 times), dX and dW, into buffers of the inputs' dtype."""

    def build(problem: FromHidden) -> Step:
        hidden, weight = (leaf.detach() for leaf in problem.leaves)
        logits = hidden.new_empty(hidden.shape[0], weight.shape[0])
        grad_hidden, grad_weight = torch.empty_like(hidden), torch.empty_like(weight)

        def step() -> Results:
            for _ in range(products - 2):
                torch.mm(hidden, weight.t(), out=logits)
            torch.mm(logits, weight, out=grad_hidden)
            torch.mm(logits.t(), hidden, out=grad_weight)
            return {}

        return step

    return build


def fp32_product_floor(products: int) -> Callable[[FromHidden], Step]:
    """Compute the products of `product_floor` into fp32 buffers, and add dW to one, as exact gradients need it."""

    def build(problem: FromHidden) -> Step:
        from pctrain_kernels.matmul import add_product, product

        hidden, weight = (leaf.detach() for leaf in problem.leaves)
        logits = hidden.new_empty(hidden.shape[0], weight.shape[0], dtype=torch.float32)
        dlogits = torch.randn_like(logits, dtype=hidden.dtype)
        grad_hidden = torch.empty_like(hidden, dtype=torch.float32)
        grad_weight = torch.zeros_like(weight, dtype=torch.float32)

        def step() -> Results:
            for _ in range(products - 2):
                product(hidden, weight.t(), out=logits)
            product(dlogits, weight, out=grad_hidden)
            add_product(grad_weight, dlogits.t(), hidden)
            return {}

        return warm(step)  # fails here where the device has no half precision product with an fp32 result

    return build
