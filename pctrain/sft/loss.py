"""The token loss of SFT, and its mean over each source."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from pctrain.core.step import TokenLoss
from pctrain.data.trajectories import SOURCE


def cross_entropy(logprob: torch.Tensor, entropy: None, streams: dict[str, torch.Tensor]):
    """Per-token loss of SFT: logprob [n] -> (-logprob [n], no metrics). It does not ask for the entropy."""
    return -logprob, {}


def cross_entropy_by_source(names: Sequence[str]) -> TokenLoss:
    """The same loss; its metrics are each source's part of it, `loss/<name>`: 0 on the tokens of the others (stream `source`).

    A metric is a mean over the tokens of all sources: `of_sources` makes it one over the source's own.
    """
    if len(names) == 1:
        return cross_entropy

    def token_loss(logprob: torch.Tensor, entropy: None, streams: dict[str, torch.Tensor]):
        return -logprob, {
            f"loss/{name}": torch.where(streams[SOURCE] == i, -logprob, 0.0) for i, name in enumerate(names)
        }

    return token_loss


def of_sources(metrics: dict[str, float], names: Sequence[str], loss_tokens: Sequence[int]) -> dict[str, float]:
    """Metrics of `cross_entropy_by_source` as means over each source's tokens; a source without a token in the batch is left out.

    Args:
        loss_tokens: of each source, in this batch.
    """
    if len(names) == 1:
        return metrics
    total = sum(loss_tokens)
    means = {
        f"loss/{name}": metrics[f"loss/{name}"] * total / own
        for name, own in zip(names, loss_tokens, strict=True)
        if own
    }
    return {key: value for key, value in metrics.items() if key not in {f"loss/{name}" for name in names}} | means
