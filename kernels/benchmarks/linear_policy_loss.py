"""Op 5: the clipped policy loss from hidden states, forward and backward."""

from __future__ import annotations

from collections.abc import Callable

import torch
from harness import FLOOR, FP32_FLOOR, HeadShape, Op, Step
from problems import Coefficients, FromHidden, from_hidden, mean_negative_logprob
from providers import compiled, fp32_product_floor, loss_of_hidden, product_floor, warm
from torch import Tensor

CLIP_LOW, CLIP_HIGH = 0.2, 0.28
SEQUENCE = 512  # tokens that share an advantage


def token_loss(logprob: Tensor, old_logprob: Tensor, advantage: Tensor) -> Tensor:
    """Return the clipped policy loss of each token."""
    ratio = (logprob - old_logprob).exp()
    return -torch.minimum(ratio * advantage, ratio.clamp(1 - CLIP_LOW, 1 + CLIP_HIGH) * advantage)


def make(shape: HeadShape, device: torch.device, dtype: torch.dtype) -> FromHidden:
    """Make the inputs, with advantages and sampling log-probs."""
    problem = from_hidden(mean_negative_logprob)(shape, device, dtype)
    tokens, problem.sequence = shape.tokens, min(SEQUENCE, shape.tokens)
    if tokens % problem.sequence:
        raise ValueError(
            f"linear_policy_loss is measured on sequences of {SEQUENCE} tokens: T = {tokens} is not a multiple of it"
        )
    problem.advantage = torch.randn(tokens // problem.sequence, device=device).repeat_interleave(problem.sequence)
    logprob = torch.cat([part.logprob for part in problem.exact(problem.coefficients)])
    # Log-ratios on either side of the clip's edges (-0.22 and 0.25), and so far away that rounding moves none across.
    shift = torch.tensor([-0.5, -0.05, 0.05, 0.5], device=device)
    problem.old_logprob = logprob.float() - shift[torch.randint(4, (tokens,), device=device)]
    problem.coefficients = coefficients(problem.old_logprob.double(), problem.advantage.double())
    return problem


def coefficients(old_logprob: Tensor, advantage: Tensor) -> Coefficients:
    """Return the loss and its derivatives in float64, by autograd over the log-probs."""
    tokens = old_logprob.numel()

    def derivatives(logprob: Tensor, entropy: Tensor, rows: slice) -> tuple[Tensor, Tensor, Tensor]:
        leaf = logprob.detach().requires_grad_()
        with torch.enable_grad():
            loss = token_loss(leaf, old_logprob[rows], advantage[rows]) / tokens
            [by_logprob] = torch.autograd.grad(loss.sum(), leaf)
        return loss.detach(), by_logprob, torch.zeros_like(entropy)

    return derivatives


def plain(hidden: Tensor, weight: Tensor, target: Tensor, old_logprob: Tensor, advantage: Tensor) -> Tensor:
    """Return the operation in plain PyTorch."""
    logprob = torch.log_softmax((hidden @ weight.T).float(), 1).gather(1, target[:, None]).squeeze(1)
    return token_loss(logprob, old_logprob, advantage).mean()


def as_step(function: Callable[..., Tensor]) -> Callable[[FromHidden], Step]:
    """Build a provider from the bare function."""
    return loss_of_hidden(
        lambda hidden, weight, problem: function(hidden, weight, problem.target, problem.old_logprob, problem.advantage)
    )


def ours(problem: FromHidden) -> Step:
    """Build the provider from pctrain_kernels."""

    from pctrain_kernels import linear_policy_loss

    def loss(hidden: Tensor, weight: Tensor, problem: FromHidden) -> Tensor:
        return linear_policy_loss(
            hidden,
            weight,
            problem.target,
            advantage=problem.advantage,
            old_logprob=problem.old_logprob,
            denom=problem.target.numel(),
            clip_low=CLIP_LOW,
            clip_high=CLIP_HIGH,
        )[0]

    return loss_of_hidden(loss)(problem)


def verl(problem: FromHidden) -> Step:
    """Build the provider from verl."""

    from verl.utils.kernel.linear_cross_entropy import linear_cross_entropy

    def loss(hidden: Tensor, weight: Tensor, target: Tensor, old_logprob: Tensor, advantage: Tensor) -> Tensor:
        return token_loss(linear_cross_entropy(hidden, weight, target, 1.0, "none")[0], old_logprob, advantage).mean()

    return as_step(loss)(problem)


def liger(*, compile: bool) -> Callable[[FromHidden], Step]:
    """Build the provider from Liger-Kernel, with its default of one sequence at a time."""

    def build(problem: FromHidden) -> Step:
        from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss

        if compile:
            compiled(lambda x: x)  # raises with the reason if torch.compile is off
        module = LigerFusedLinearGRPOLoss(
            beta=0.0,
            compiled=compile,
            use_ref_model=False,
            epsilon_low=CLIP_LOW,
            epsilon_high=CLIP_HIGH,
            loss_type="bnpo",
        )
        by_sequence = (-1, problem.sequence)

        def loss(hidden: Tensor, weight: Tensor, problem: FromHidden) -> Tensor:
            return module(
                hidden.view(*by_sequence, hidden.shape[1]),
                weight,
                problem.target.view(by_sequence),
                torch.ones_like(problem.advantage).view(by_sequence),
                problem.advantage.view(by_sequence)[:, 0],
                old_per_token_logps=problem.old_logprob.view(by_sequence),
            )[0]

        return warm(loss_of_hidden(loss)(problem)) if compile else loss_of_hidden(loss)(problem)

    return build


OP = Op(
    name="linear_policy_loss",
    floor="three matrix products, the logits held; fp32: with fp32 logits and an fp32 sum of dW",
    products=3,
    make=make,
    providers={
        FLOOR: product_floor(3),
        FP32_FLOOR: fp32_product_floor(3),
        "eager": as_step(plain),
        "torch.compile": lambda problem: warm(as_step(compiled(plain))(problem)),
        "pctrain_kernels": ours,
        "Liger": liger(compile=True),
        "Liger, eager": liger(compile=False),
        "verl": verl,
    },
)
