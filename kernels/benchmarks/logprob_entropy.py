"""Op 1: log-prob of the target and entropy from logits, forward and backward."""

from __future__ import annotations

import torch
from harness import FLOOR, Op, Step
from problems import FromLogits, from_logits
from providers import compiled, copy_floor, of_logits, warm
from torch import Tensor


def plain(logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Return the operation in plain PyTorch."""
    log_p = torch.log_softmax(logits.float(), 1)
    return log_p.gather(1, target[:, None]).squeeze(1), -(log_p.exp() * log_p).sum(1)


def ours(problem: FromLogits) -> Step:
    """Build the provider from pctrain_kernels."""

    from pctrain_kernels import vocab_parallel_logprob_entropy

    return of_logits(vocab_parallel_logprob_entropy)(problem)


def verl(problem: FromLogits) -> Step:
    """Build the provider from verl."""

    from verl.utils.torch_functional import entropy_from_logits, logprobs_from_logits

    # In place, it would overwrite the logits that the entropy is computed from.
    return of_logits(
        lambda logits, target: (
            logprobs_from_logits(logits, target, inplace_backward=False),
            entropy_from_logits(logits),
        )
    )(problem)


OP = Op(
    name="logprob_entropy",
    floor="memory traffic of two reads and one write of [T, V]",
    make=from_logits(has_loss=False),
    providers={
        FLOOR: copy_floor,
        "eager": of_logits(plain),
        "torch.compile": lambda problem: warm(of_logits(compiled(plain))(problem)),
        "pctrain_kernels": ours,
        "verl": verl,
    },
)
