"""Inputs of the benchmarks and their float64 answers.

Logits have a standard deviation of 3, so that some twenty tokens share the mass of a row. With flat rows the softmax
part of a gradient would vanish next to the one-hot part, and a provider that leaves it out would pass the comparison.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from harness import HeadShape, Results
from torch import Tensor

SAMPLED = 64  # rows, and columns, whose gradients are compared
FLOAT64_BYTES = 2**28  # of the logits in one chunk of the float64 answer

# (logprob, entropy, rows) float64 [n] -> per-token loss [n] (None if the operation has none), and its derivatives by
# logprob and by entropy [n].
Coefficients = Callable[[Tensor, Tensor, slice], tuple[Tensor | None, Tensor, Tensor]]


class Exact(NamedTuple):
    """A chunk of rows in float64."""

    rows: slice
    logprob: Tensor
    entropy: Tensor
    loss: Tensor | None
    dlogits: Tensor


def exact_rows(
    logits: Callable[[slice], Tensor], target: Tensor, vocab: int, coefficients: Coefficients
) -> Iterator[Exact]:
    """Yield the operation in float64, chunk by chunk; logits(rows) returns float64 [n, V]."""
    size = max(1, FLOAT64_BYTES // (8 * vocab))
    for start in range(0, target.shape[0], size):
        rows = slice(start, min(target.shape[0], start + size))
        log_p = torch.log_softmax(logits(rows), 1)
        column = target[rows, None]
        logprob = log_p.gather(1, column).squeeze(1)
        p = log_p.exp()
        entropy = -(p * log_p).sum(1)
        loss, by_logprob, by_entropy = coefficients(logprob, entropy, rows)
        dlogits = log_p.add_(entropy[:, None]).mul_(-by_entropy[:, None]).sub_(by_logprob[:, None]).mul_(p)
        dlogits.scatter_add_(1, column, by_logprob[:, None])
        yield Exact(rows, logprob, entropy, loss, dlogits)


def mean_negative_logprob(tokens: int) -> Coefficients:
    """Return the coefficients of the plain loss, the mean of -logprob."""
    return lambda logprob, entropy, rows: (
        -logprob / tokens,
        torch.full_like(logprob, -1 / tokens),
        torch.zeros_like(entropy),
    )


@dataclass
class FromLogits:
    """logits [T, V], target [T], and upstream gradients of log-prob and entropy [T] fp32."""

    logits: Tensor
    target: Tensor
    upstream: Tensor
    entropy_upstream: Tensor
    has_loss: bool  # one scalar, mean of -logprob; otherwise log-prob and entropy with the upstream gradients

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the inputs."""
        return self.logits.dtype

    @cached_property
    def rows(self) -> Tensor:
        """Indices of the rows whose gradients are compared."""
        return torch.randperm(self.target.shape[0], device=self.target.device)[:SAMPLED]

    def sample(self, results: Results) -> Results:
        """Return the rows that are compared."""
        return {name: value if value.ndim == 0 else value[self.rows] for name, value in results.items()}

    def expected(self) -> Results:
        """Return the float64 answer in the sampled rows."""
        tokens, vocab = self.logits.shape
        coefficients = mean_negative_logprob(tokens) if self.has_loss else _upstream(self)
        whole = exact_rows(lambda rows: self.logits[rows].detach().double(), self.target, vocab, coefficients)
        chunks = [(part.logprob, part.entropy, part.loss) for part in whole]
        values = _values(chunks, self.has_loss)
        # Only the sampled rows' gradients are kept.
        sampled = exact_rows(
            lambda rows: self.logits[self.rows[rows]].detach().double(),
            self.target[self.rows],
            vocab,
            coefficients if self.has_loss else _upstream(self, self.rows),
        )
        return self.sample(values) | {"grad_logits": torch.cat([part.dlogits for part in sampled])}


@dataclass
class FromHidden:
    """hidden [T, H], weight [V, H], target [T]; upstream gradients as above, or a per-token loss."""

    hidden: Tensor
    weight: Tensor
    target: Tensor
    upstream: Tensor
    entropy_upstream: Tensor
    coefficients: Coefficients | None = None  # None for log-prob and entropy with the upstream gradients
    advantage: Tensor | None = None  # [T], one value per sequence of `sequence` tokens
    old_logprob: Tensor | None = None  # [T]
    sequence: int = 1

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the inputs."""
        return self.hidden.dtype

    @property
    def leaves(self) -> tuple[Tensor, Tensor]:
        """Hidden states and weight."""
        return self.hidden, self.weight

    @cached_property
    def rows(self) -> Tensor:
        """Indices of the rows whose gradients are compared."""
        return torch.randperm(self.target.shape[0], device=self.target.device)[:SAMPLED]

    @cached_property
    def columns(self) -> tuple[Tensor, Tensor]:
        """Vocabulary entries that are the target of a token, and others: the one-hot part of dW hides the rest."""
        vocab = self.weight.shape[0]
        is_target = torch.zeros(vocab, dtype=torch.bool, device=self.target.device)
        is_target[self.target] = True
        order = torch.randperm(vocab, device=self.target.device)
        return order[is_target[order]][:SAMPLED], order[~is_target[order]][:SAMPLED]

    def sample(self, results: Results) -> Results:
        """Return the rows that are compared."""
        sampled = {}
        for name, value in results.items():
            if name == "grad_weight":
                sampled |= {
                    "grad_weight of targets": value[self.columns[0]],
                    "grad_weight of others": value[self.columns[1]],
                }
            else:
                sampled[name] = value if value.ndim == 0 else value[self.rows]
        return sampled

    def exact(self, coefficients: Coefficients) -> Iterator[Exact]:
        """Yield the operation in float64, chunk by chunk."""
        weight = self.weight.detach().double()
        return exact_rows(
            lambda rows: self.hidden[rows].detach().double() @ weight.T, self.target, weight.shape[0], coefficients
        )

    def expected(self) -> Results:
        """Return the float64 answer in the sampled rows."""
        weight = self.weight.detach().double()
        columns = torch.cat(self.columns)
        grad_weight = weight.new_zeros(len(columns), weight.shape[1])
        grad_hidden = weight.new_zeros(self.hidden.shape)
        values = []
        for part in self.exact(self.coefficients or _upstream(self)):
            values.append(part[1:4])
            grad_weight += part.dlogits[:, columns].T @ self.hidden[part.rows].detach().double()
            sampled = self.rows[(self.rows >= part.rows.start) & (self.rows < part.rows.stop)]
            grad_hidden[sampled] = part.dlogits[sampled - part.rows.start] @ weight
        targets_grad, others_grad = grad_weight.split([len(part) for part in self.columns])
        rows = self.sample(_values(values, self.coefficients is not None) | {"grad_hidden": grad_hidden})
        return rows | {"grad_weight of targets": targets_grad, "grad_weight of others": others_grad}


def _upstream(problem: FromLogits | FromHidden, index: Tensor | None = None) -> Coefficients:
    upstream, entropy_upstream = (
        x.double() if index is None else x[index].double() for x in (problem.upstream, problem.entropy_upstream)
    )
    return lambda logprob, entropy, rows: (None, upstream[rows], entropy_upstream[rows])


def _values(chunks: list[tuple[Tensor, Tensor, Tensor | None]], has_loss: bool) -> Results:
    logprob, entropy, loss = zip(*chunks, strict=True)
    return (
        {"loss": torch.cat(loss).sum()} if has_loss else {"logprob": torch.cat(logprob), "entropy": torch.cat(entropy)}
    )


def _upstreams(tokens: int, device: torch.device) -> tuple[Tensor, Tensor]:
    return torch.randn(tokens, device=device) / tokens, torch.randn(tokens, device=device) / tokens


def from_logits(*, has_loss: bool) -> Callable[[HeadShape, torch.device, torch.dtype], FromLogits]:
    """Return a function that makes random inputs from logits."""

    def make(shape: HeadShape, device: torch.device, dtype: torch.dtype) -> FromLogits:
        torch.manual_seed(0)
        logits = torch.randn(shape.tokens, shape.vocab, device=device, dtype=dtype).mul_(3).requires_grad_()
        target = torch.randint(shape.vocab, (shape.tokens,), device=device)
        return FromLogits(logits, target, *_upstreams(shape.tokens, device), has_loss)

    return make


def from_hidden(
    coefficients: Callable[[int], Coefficients] | None,
) -> Callable[[HeadShape, torch.device, torch.dtype], FromHidden]:
    """Return a function that makes random inputs from hidden states."""

    def make(shape: HeadShape, device: torch.device, dtype: torch.dtype) -> FromHidden:
        torch.manual_seed(0)
        hidden = torch.randn(shape.tokens, shape.width, device=device, dtype=dtype).requires_grad_()
        weight = (
            torch.randn(shape.vocab, shape.width, device=device, dtype=dtype)
            .mul_(3 / shape.width**0.5)
            .requires_grad_()
        )
        target = torch.randint(shape.vocab, (shape.tokens,), device=device)
        loss = None if coefficients is None else coefficients(shape.tokens)
        return FromHidden(hidden, weight, target, *_upstreams(shape.tokens, device), loss)

    return make
