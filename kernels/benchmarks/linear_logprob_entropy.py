"""Op 3: log-prob of the target and entropy from hidden states, forward and backward."""

from __future__ import annotations

from harness import FLOOR, FP32_FLOOR, Op, Step
from logprob_entropy import plain as from_logits
from problems import FromHidden, from_hidden
from providers import compiled, fp32_product_floor, of_hidden, product_floor, warm
from torch import Tensor


def plain(hidden: Tensor, weight: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Return the operation in plain PyTorch."""
    return from_logits(hidden @ weight.T, target)


def ours(problem: FromHidden) -> Step:
    """Build the provider from pctrain_kernels."""

    from pctrain_kernels import linear_logprob_entropy

    return of_hidden(linear_logprob_entropy)(problem)


def verl(problem: FromHidden) -> Step:
    """Build the provider from verl."""

    from verl.utils.kernel.linear_cross_entropy import linear_cross_entropy

    return of_hidden(lambda hidden, weight, target: linear_cross_entropy(hidden, weight, target, 1.0, "none"))(problem)


OP = Op(
    name="linear_logprob_entropy",
    floor="four matrix products, the logits held; fp32: with fp32 logits and an fp32 sum of dW",
    products=4,
    make=from_hidden(None),
    providers={
        FLOOR: product_floor(4),
        FP32_FLOOR: fp32_product_floor(4),
        "eager": of_hidden(plain),
        "torch.compile": lambda problem: warm(of_hidden(compiled(plain))(problem)),
        "pctrain_kernels": ours,
        "verl": verl,
    },
)
