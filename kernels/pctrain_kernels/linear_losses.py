"""`linear_token_loss` with the losses of this package: cross entropy and the policy loss."""

from __future__ import annotations

from typing import TypedDict, Unpack

import torch.distributed as dist
from torch import Tensor

from pctrain_kernels.linear_token_loss import Streams, linear_token_loss
from pctrain_kernels.policy import PolicyLoss, given_streams


class HeadKeywords(TypedDict, total=False):
    """The keywords that say how the head is computed; `linear_token_loss` explains them."""

    vocab_start: int
    valid_vocab: int | None
    group: dist.ProcessGroup | None
    temperature: float
    ignore_index: int
    chunk_tokens: int | None
    grad_weight_out: Tensor | None
    sequence_parallel: bool
    rows: Tensor | None


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    *,
    denom: float | Tensor,
    token_weight: Tensor | None = None,
    want_entropy: bool = False,
    **head: Unpack[HeadKeywords],
) -> tuple[Tensor, Streams]:
    """Return the loss -sum_i token_weight_i logprob_i / denom and metrics; its gradient is made in the forward pass.

    This is `linear_token_loss` with that loss. The metrics are {"entropy": sum_i token_weight_i entropy_i} with
    `want_entropy`, which costs a pass over the logits, else {}.
    """
    return linear_token_loss(
        hidden,
        weight,
        target,
        _nll,
        streams={},
        denom=denom,
        token_weight=token_weight,
        want_entropy=want_entropy,
        **head,
    )


def _nll(logprob: Tensor, entropy: Tensor | None, streams: Streams) -> tuple[Tensor, Streams]:
    return -logprob, {} if entropy is None else {"entropy": entropy.detach()}


def linear_policy_loss(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    *,
    advantage: Tensor,
    denom: float | Tensor,
    old_logprob: Tensor | None = None,
    ref_logprob: Tensor | None = None,
    rollout_logprob: Tensor | None = None,
    token_weight: Tensor | None = None,
    clip_low: float | None = 0.2,
    clip_high: float | None = 0.28,
    dual_clip: float | None = None,
    kl_coef: float = 0.0,
    kl_kind: str = "k3",
    entropy_coef: float = 0.0,
    is_cap: float | None = None,
    expert_mask: Tensor | None = None,
    expert_shaping: float | None = None,
    want_entropy: bool = True,
    **head: Unpack[HeadKeywords],
) -> tuple[Tensor, Streams]:
    """Return sum_i token_weight_i loss_i / denom over the rows with a target, and metrics.

    This is `linear_token_loss` with the loss and the keywords of `policy_loss`. The streams and token_weight are [T];
    hidden, weight, target, denom, the keywords of the head and the sums of metrics are those of `linear_token_loss`.
    want_entropy=False saves a pass over the logits; the metric `entropy` is then absent.
    """
    loss = PolicyLoss(
        clip_low=clip_low,
        clip_high=clip_high,
        dual_clip=dual_clip,
        kl_coef=kl_coef,
        kl_kind=kl_kind,
        entropy_coef=entropy_coef,
        is_cap=is_cap,
        expert_shaping=expert_shaping,
    )
    streams = given_streams(advantage, old_logprob, ref_logprob, rollout_logprob, expert_mask)
    return linear_token_loss(
        hidden,
        weight,
        target,
        loss,
        streams=streams,
        denom=denom,
        token_weight=token_weight,
        want_entropy=want_entropy,
        **head,
    )
