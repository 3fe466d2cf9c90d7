"""Op 2: mean cross entropy from logits, forward and backward."""

from __future__ import annotations

from collections.abc import Callable

import torch
from harness import FLOOR, Op, Results, Step
from problems import FromLogits, from_logits
from providers import compiled, copy_floor, warm
from torch import Tensor
from torch.nn import functional as F


def plain(logits: Tensor, target: Tensor) -> Tensor:
    """Return the operation in plain PyTorch."""
    return F.cross_entropy(logits.float(), target)


def as_step(function: Callable[[Tensor, Tensor], Tensor]) -> Callable[[FromLogits], Step]:
    """Build a provider from the bare function."""

    def build(problem: FromLogits) -> Step:
        def step() -> Results:
            loss = function(problem.logits, problem.target)
            [grad] = torch.autograd.grad(loss, (problem.logits,))
            return {"loss": loss.detach(), "grad_logits": grad}

        return step

    return build


def ours(problem: FromLogits) -> Step:
    """Build the provider from pctrain_kernels."""

    from pctrain_kernels import vocab_parallel_cross_entropy

    return as_step(lambda logits, target: vocab_parallel_cross_entropy(logits, target).sum() / target.numel())(problem)


def liger(problem: FromLogits) -> Step:
    """Build the provider from Liger-Kernel."""

    from liger_kernel.transformers.functional import liger_cross_entropy

    # Its gradient overwrites the logits, so it works on a copy, whose time counts.
    return as_step(lambda logits, target: liger_cross_entropy(logits.clone(), target))(problem)


def quack(problem: FromLogits) -> Step:
    """Build the provider from QuACK."""

    from quack.cross_entropy import cross_entropy

    return as_step(lambda logits, target: cross_entropy(logits, target, reduction="mean"))(problem)


OP = Op(
    name="cross_entropy",
    floor="memory traffic of two reads and one write of [T, V]",
    make=from_logits(has_loss=True),
    providers={
        FLOOR: copy_floor,
        "eager": as_step(plain),
        "torch.compile": lambda problem: warm(as_step(compiled(plain))(problem)),
        "pctrain_kernels": ours,
        "Liger, on a copy": liger,
        "QuACK": quack,
    },
)
