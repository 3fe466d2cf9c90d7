"""Op 4: a loss of every token's log-prob from hidden states, here mean cross entropy, forward and backward."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from harness import FLOOR, FP32_FLOOR, HELD, Op, Results, Step
from problems import FromHidden, from_hidden, mean_negative_logprob
from providers import compiled, fp32_product_floor, loss_of_hidden, product_floor, warm
from torch import Tensor
from torch.nn import functional as F


def plain(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    """Return the operation in plain PyTorch."""
    return F.cross_entropy((hidden @ weight.T).float(), target)


def as_step(function: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Callable[[FromHidden], Step]:
    """Build a provider from the bare function."""
    return loss_of_hidden(lambda hidden, weight, problem: function(hidden, weight, problem.target))


def ours(*, want_entropy: bool = False, chunk_tokens: int | None = None) -> Callable[[FromHidden], Step]:
    """Build the provider from pctrain_kernels."""

    def build(problem: FromHidden) -> Step:
        from pctrain_kernels import linear_token_loss

        def loss(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
            return linear_token_loss(
                hidden,
                weight,
                target,
                lambda logprob, entropy, streams: (-logprob, {}),
                streams={},
                denom=target.numel(),
                want_entropy=want_entropy,
                chunk_tokens=chunk_tokens,
            )[0]

        return as_step(loss)(problem)

    return build


def ours_main_grad(problem: FromHidden) -> Step:
    """Build the provider that adds dW to an fp32 buffer which outlives the step, like Megatron's `main_grad`."""
    from pctrain_kernels import linear_token_loss

    main_grad = torch.zeros_like(problem.weight, dtype=torch.float32, requires_grad=False)

    def step() -> Results:
        loss, _ = linear_token_loss(
            *problem.leaves,
            problem.target,
            lambda logprob, entropy, streams: (-logprob, {}),
            streams={},
            denom=problem.target.numel(),
            want_entropy=False,
            grad_weight_out=main_grad,
        )
        grad_hidden, _ = torch.autograd.grad(loss, problem.leaves)
        return {"loss": loss.detach(), "grad_hidden": grad_hidden, f"{HELD}grad_weight": main_grad}

    return step


def torch_fused(problem: FromHidden) -> Step:
    """Build the provider from torch's linear_cross_entropy."""
    if not hasattr(F, "linear_cross_entropy"):
        raise ImportError(f"torch {torch.__version__} has no torch.nn.functional.linear_cross_entropy")
    options = torch.nn.LinearCrossEntropyOptions()
    return as_step(partial(F.linear_cross_entropy, options=options))(problem)


def liger(problem: FromHidden) -> Step:
    """Build the provider from Liger-Kernel."""

    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    return as_step(liger_fused_linear_cross_entropy)(problem)


def cut(filter_eps: float | str | None) -> Callable[[FromHidden], Step]:
    """Build the provider from cut-cross-entropy."""

    def build(problem: FromHidden) -> Step:
        from cut_cross_entropy import linear_cross_entropy

        return as_step(partial(linear_cross_entropy, filter_eps=filter_eps))(problem)

    return build


def quack(problem: FromHidden) -> Step:
    """Build the provider from QuACK."""

    from quack.linear_cross_entropy import chunked_linear_cross_entropy

    return as_step(chunked_linear_cross_entropy)(problem)


OP = Op(
    name="linear_token_loss",
    floor="three matrix products, the logits held; fp32: with fp32 logits and an fp32 sum of dW",
    products=3,
    make=from_hidden(mean_negative_logprob),
    providers={
        FLOOR: product_floor(3),
        FP32_FLOOR: fp32_product_floor(3),
        "eager": as_step(plain),
        "torch.compile": lambda problem: warm(as_step(compiled(plain))(problem)),
        "torch linear_cross_entropy": torch_fused,
        "pctrain_kernels": ours(),
        "pctrain_kernels, entropy": ours(want_entropy=True),
        "pctrain_kernels, main_grad": ours_main_grad,
        "Liger": liger,
        "CCE": cut("auto"),
        "CCE, no filter": cut(None),
        "QuACK": quack,
    },
)

# The measurement that set `CPU_LOGITS_BYTES` in pctrain_kernels/head.py; not part of the default run.
CHUNKS = Op(
    name="chunk_sizes",
    floor=OP.floor,
    products=OP.products,
    make=OP.make,
    providers={FLOOR: product_floor(3), FP32_FLOOR: fp32_product_floor(3)}
    | {
        f"{mib} MiB of logits": lambda problem, mib=mib: ours(
            chunk_tokens=max(1, mib * 2**20 // (4 * problem.weight.shape[0]))
        )(problem)
        for mib in (1, 2, 4, 8, 16, 32, 64, 128)
    },
)
