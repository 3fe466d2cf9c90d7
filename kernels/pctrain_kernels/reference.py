"""The definition of every operation, in plain PyTorch on one process: full logits, autograd, no chunks.

The arithmetic is fp32, or float64 for float64 inputs. Tests compare the fused operations with this file. `weight` is
the whole output matrix [V, H] and `logits` are [T, V]; there are no shards here. `policy.policy_loss` is plain PyTorch
per token, and so its own definition; `linear_policy_loss` and `linear_cross_entropy` are `linear_token_loss` with that
and with -logprob.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor


def vocab_parallel_logprob_entropy(
    logits: Tensor,
    target: Tensor,
    *,
    valid_vocab: int | None = None,
    temperature: float = 1.0,
    ignore_index: int = -100,
    want_entropy: bool = True,
) -> tuple[Tensor, Tensor | None]:
    """Return logprob [T] = log softmax(x_i / temperature)[target_i] and entropy [T] = -sum p log p, or None.

    The softmax is over the columns of the logits x [T, V] below `valid_vocab`. Both results are 0 where target is
    `ignore_index`.
    """
    log_p = torch.log_softmax(_full_precision(logits[:, :valid_vocab]) / temperature, dim=-1)
    labelled = target != ignore_index
    logprob = log_p.gather(1, target.where(labelled, 0)[:, None]).squeeze(1).where(labelled, 0)
    if not want_entropy:
        return logprob, None
    return logprob, -(log_p.exp() * log_p).sum(-1).where(labelled, 0)


def vocab_parallel_cross_entropy(
    logits: Tensor,
    target: Tensor,
    *,
    valid_vocab: int | None = None,
    temperature: float = 1.0,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
) -> Tensor:
    """Return the loss [T] = (1 - a) (-log p[target]) + a mean_j(-log p_j) + z_loss (log sum_j e^(x_j / temperature))^2.

    a is label_smoothing.
    """
    logprob, _ = vocab_parallel_logprob_entropy(
        logits, target, valid_vocab=valid_vocab, temperature=temperature, ignore_index=ignore_index, want_entropy=False
    )
    y = _full_precision(logits[:, :valid_vocab]) / temperature
    others = -label_smoothing * torch.log_softmax(y, -1).mean(-1) + z_loss * torch.logsumexp(y, -1).square()
    return -(1 - label_smoothing) * logprob + others.where(target != ignore_index, 0)


def _full_precision(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def linear_logprob_entropy(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    *,
    valid_vocab: int | None = None,
    temperature: float = 1.0,
    ignore_index: int = -100,
    want_entropy: bool = True,
) -> tuple[Tensor, Tensor | None]:
    """Return logprob [T] = log softmax(W h_i / temperature)[target_i] and entropy [T] = -sum p log p, or None.

    hidden is [T, H], weight [V, H] and target int64 [T]. The softmax is over the columns below `valid_vocab`. Both
    results are 0 where target is `ignore_index`.
    """
    logits = _full_precision(hidden) @ _full_precision(weight[:valid_vocab]).T
    return vocab_parallel_logprob_entropy(
        logits,
        target,
        valid_vocab=valid_vocab,
        temperature=temperature,
        ignore_index=ignore_index,
        want_entropy=want_entropy,
    )


def linear_token_loss(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    token_loss: Callable[..., tuple[Tensor, dict[str, Tensor]]],
    *,
    streams: Mapping[str, Tensor],
    denom: float | Tensor,
    token_weight: Tensor | None = None,
    valid_vocab: int | None = None,
    temperature: float = 1.0,
    ignore_index: int = -100,
    want_entropy: bool = True,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return loss = sum_i token_weight_i loss_i / denom over the rows with a target, and detached metrics.

    A metric is sum_i token_weight_i value_i, or for `max/...` the largest value_i with token_weight_i > 0.
    """
    logprob, entropy = linear_logprob_entropy(
        hidden,
        weight,
        target,
        valid_vocab=valid_vocab,
        temperature=temperature,
        ignore_index=ignore_index,
        want_entropy=want_entropy,
    )
    labelled = target != ignore_index
    loss, metrics = token_loss(
        logprob[labelled],
        None if entropy is None else entropy[labelled],
        {name: stream[labelled] for name, stream in streams.items()},
    )
    weights = torch.ones_like(loss) if token_weight is None else token_weight[labelled]

    def reduced(name: str, value: Tensor) -> Tensor:
        if not name.startswith("max/"):
            return (weights * value).sum().detach()
        counted = value.detach()[weights > 0].tolist()
        return value.new_tensor(max(counted, default=-torch.inf))

    return (weights * loss).sum() / denom, {name: reduced(name, value) for name, value in metrics.items()}
