"""The token loss of SFT, and its mean over each source."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from pctrain.data.trajectories import SOURCE
from pctrain_kernels import TokenLoss
from pctrain_kernels.linear_token_loss import Streams


def cross_entropy(
    logprob: torch.Tensor, entropy: torch.Tensor | None, streams: Streams
) -> tuple[torch.Tensor, Streams]:
    """Return -logprob [n] and no metrics. The loss does not need the entropy."""
    return -logprob, {}


def cross_entropy_by_source(names: Sequence[str]) -> TokenLoss:
    """Return the cross entropy with the metrics `loss/<name>`: each source's part of it, 0 on the others' tokens.

    A metric is a mean over the tokens of all sources; `source_means` turns it into one over the source's own tokens.
    The stream `source` has the number of each token's source.
    """
    if len(names) == 1:
        return cross_entropy

    def token_loss(
        logprob: torch.Tensor, entropy: torch.Tensor | None, streams: Streams
    ) -> tuple[torch.Tensor, Streams]:
        return -logprob, {
            f"loss/{name}": torch.where(streams[SOURCE] == i, -logprob, 0.0) for i, name in enumerate(names)
        }

    return token_loss


def source_means(metrics: dict[str, float], names: Sequence[str], loss_tokens: Sequence[int]) -> dict[str, float]:
    """Return the metrics of `cross_entropy_by_source` as means over each source's own tokens.

    `loss_tokens` counts the tokens of each source in this batch. A source without a token in the batch is omitted.
    """
    if len(names) == 1:
        return metrics
    total = sum(loss_tokens)
    means = {key: value for key, value in metrics.items() if key not in {f"loss/{name}" for name in names}}
    for name, tokens in zip(names, loss_tokens, strict=True):
        if tokens:
            means[f"loss/{name}"] = metrics[f"loss/{name}"] * total / tokens
    return means
