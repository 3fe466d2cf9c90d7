"""The SFT validation loss, exactly: the sum of the token losses over all validation tokens, divided by their number.

It is the control signal of the framework, so it depends neither on packing, nor on micro-batches, nor on how many ranks share the work.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch

from pctrain.core import Core
from pctrain.data.rows import Row


def cross_entropy(logprob: torch.Tensor, entropy: None, streams: dict[str, torch.Tensor]):
    """Per-token loss of SFT: logprob [n] -> (-logprob [n], no metrics). It does not ask for the entropy."""
    return -logprob, {}


@dataclass(frozen=True)
class ValidationLoss:
    loss: float  # nats a token
    se: float  # standard error, trajectories as the independent draws
    tokens: int
    sequences: int


def validation_loss(core: Core, rows: list[Row], token_budget: int) -> ValidationLoss:
    """Collective. The standard error is the ratio estimator's: residuals S_i - L n_i of each trajectory's loss sum S_i over n_i tokens."""
    sums, counts = [], []
    for row, logprob in zip(rows, core.logprobs(rows, token_budget), strict=True):
        trained = row.weights > 0
        sums.append(-float(logprob[trained].sum(dtype=np.float64)))
        counts.append(int(trained.sum()))
    sums, counts, n = np.array(sums), np.array(counts), len(rows)
    loss = float(sums.sum() / counts.sum())
    residual = sums - loss * counts
    se = math.sqrt(float((residual**2).sum()) * n / max(1, n - 1)) / float(counts.sum())
    return ValidationLoss(loss, se, int(counts.sum()), n)
