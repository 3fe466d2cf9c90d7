"""Sum over tokens of any per-token loss of log-probability and entropy, on top of a linear head: three matrix products.

The denominator is known before the forward pass, so the derivative with respect to the logits is known as soon as the
statistics of a row are. dX and dW are made in the forward pass, from the same logits, and backward only returns them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from pctrain_kernels.head import Head, HeadOptions, dummy_weight_gradient
from pctrain_kernels.linear_logprob import row_statistics
from pctrain_kernels.matmul import math_dtype
from pctrain_kernels.merge import merge_shards
from pctrain_kernels.parallel import reduce_hidden_gradient

Streams = dict[str, Tensor]
MAX = "max/"  # metrics with this prefix are reduced by their maximum


class TokenLoss(Protocol):
    """A function of n tokens that returns their loss [n] and metrics {name: [n]}, in PyTorch.

    Each value may depend on its own token's inputs only, because tokens come in chunks. logprob [n], entropy [n] (None
    without `want_entropy`) and streams {name: [n]} are detached; the first two are differentiated. A metric `max/...`
    is reduced by its maximum over tokens with a weight above 0, any other by its weighted sum.
    """

    def __call__(self, logprob: Tensor, entropy: Tensor | None, streams: Streams) -> tuple[Tensor, Streams]:
        """Return (loss, metrics)."""
        ...


def linear_token_loss(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    token_loss: TokenLoss,
    *,
    streams: Mapping[str, Tensor],
    denom: float | Tensor,
    token_weight: Tensor | None = None,
    vocab_start: int = 0,
    valid_vocab: int | None = None,
    group: dist.ProcessGroup | None = None,
    temperature: float = 1.0,
    ignore_index: int = -100,
    want_entropy: bool = True,
    chunk_tokens: int | None = None,
    grad_weight_out: Tensor | None = None,
    sequence_parallel: bool = False,
    rows: Tensor | None = None,
) -> tuple[Tensor, Streams]:
    """Return loss = sum_i token_weight_i loss_i / denom and metrics {name: sum_i token_weight_i value_i}, fp32 scalars.

    Sums and maxima are over rows whose target is not `ignore_index`; `token_loss` gets only those. A metric
    `max/...` is the largest value_i with token_weight_i > 0, or -inf if there is none. Without grad mode there is no
    gradient work: one matrix product. `linear_logprob_entropy` explains the other arguments.

    Args:
        streams: constants {name: [T]} that `token_loss` reads.
        token_weight: [T]; None for ones.
        group: one all-gather of [4, n] per chunk; the default chunk size follows from the largest shard.
        want_entropy: False if the loss does not read the entropy: saves one pass and half of a chunk's memory.
        grad_weight_out: dW is added in the FORWARD pass, if grad mode is on. An upstream gradient other than 1 cannot
            be honored then and fails an assertion in backward. So no activation recomputation around this call.
    """
    options = HeadOptions(
        vocab_start=vocab_start,
        valid_vocab=valid_vocab,
        group=group,
        temperature=temperature,
        ignore_index=ignore_index,
        want_entropy=want_entropy,
        chunk_tokens=chunk_tokens,
        sequence_parallel=sequence_parallel,
        rows=rows,
    )
    options.check(hidden, weight, target, grad_weight_out)
    _check_per_token(target, streams, token_weight, denom)
    # Inside Function.forward grad mode is always off, so what is to be differentiated is decided here.
    if torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad):
        names: list[str] = []
        loss, *values = _LinearTokenLoss.apply(
            hidden, weight, target, options, grad_weight_out, token_loss, streams, token_weight, denom, names
        )
        return loss, dict(zip(names, values, strict=True))
    with torch.no_grad():
        head = Head(hidden, weight, target, options)
        sums = _Sums(head, token_loss, streams, token_weight, denom)
        row = row_statistics(head)
        sums.add(slice(None), row.logprob(), row.entropy() if want_entropy else None)
        return sums.loss / sums.denom, sums.metrics


def _check_per_token(
    target: Tensor, streams: Mapping[str, Tensor], token_weight: Tensor | None, denom: float | Tensor
) -> None:
    """Raise ValueError if a per-token tensor or the denominator does not fit."""
    per_token = {f"stream {name!r}": stream for name, stream in streams.items()}
    if token_weight is not None:
        per_token["token_weight"] = token_weight
    for name, tensor in per_token.items():
        if tensor.shape != target.shape:
            raise ValueError(f"expected {name} of shape {list(target.shape)}, as target has, got {list(tensor.shape)}")
    if not isinstance(denom, Tensor) and not denom > 0:
        raise ValueError(f"denom must be above 0, got {denom}")


class _Sums:
    """Calls `token_loss` on pieces of the rows, and adds up loss and metrics."""

    def __init__(
        self,
        head: Head,
        token_loss: TokenLoss,
        streams: Mapping[str, Tensor],
        token_weight: Tensor | None,
        denom: float | Tensor,
    ) -> None:
        self.token_loss = token_loss
        self.dtype = math_dtype(head.hidden)
        self.streams = {name: head.select(stream.detach()) for name, stream in streams.items()}
        self.weights = None if token_weight is None else head.select(token_weight.detach()).to(self.dtype)
        self.denom = denom.detach().to(self.dtype) if isinstance(denom, Tensor) else denom
        self.loss: Tensor | float = 0.0
        self.metrics: Streams = {}

    def add(self, piece: slice, logprob: Tensor, entropy: Tensor | None) -> Tensor:
        """Add a piece of the rows, and return its loss [n], with its graph if grad mode is on."""
        loss, metrics = self.token_loss(
            logprob, entropy, {name: stream[piece] for name, stream in self.streams.items()}
        )
        for name, value in (("the loss", loss), *metrics.items()):
            if value.shape != logprob.shape:
                shapes = f"{list(value.shape)}, not {list(logprob.shape)}"
                raise ValueError(f"token_loss must return one value per token: {name} has shape {shapes}")
        self.loss = self.loss + self._weighted_sum(piece, loss)
        for name, value in metrics.items():
            if name.startswith(MAX):
                largest = self._largest(piece, value)
                self.metrics[name] = torch.maximum(self.metrics.get(name, largest), largest)
            else:
                self.metrics[name] = self.metrics.get(name, 0.0) + self._weighted_sum(piece, value)
        return loss

    def add_differentiated(self, piece: slice, logprob: Tensor, entropy: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Add a piece, and return the derivatives [n] of sum weight * loss / denom by logprob and entropy.

        The latter is None if the loss does not depend on the entropy.
        """
        leaves = [tensor.requires_grad_() for tensor in (logprob, entropy) if tensor is not None]
        with torch.enable_grad():
            loss = self.add(piece, logprob, entropy)
        if not loss.requires_grad:
            raise ValueError(
                "the loss of token_loss depends neither on logprob nor on entropy: there is nothing to differentiate"
            )
        upstream = torch.ones_like(loss) if self.weights is None else self.weights[piece].to(loss.dtype)
        dlogprob, *dentropy = torch.autograd.grad(loss, leaves, upstream / self.denom, allow_unused=True)
        return torch.zeros_like(logprob) if dlogprob is None else dlogprob, dentropy[0] if dentropy else None

    def _weighted_sum(self, piece: slice, value: Tensor) -> Tensor:
        value = value.detach().to(self.dtype)
        return value.sum() if self.weights is None else torch.dot(value, self.weights[piece])

    def _largest(self, piece: slice, value: Tensor) -> Tensor:
        value = value.detach().to(self.dtype)
        if self.weights is not None:
            value = value.masked_fill(self.weights[piece] <= 0, -torch.inf)
        # A piece may be empty, and then has no maximum.
        return torch.cat([value, value.new_full((1,), -torch.inf)]).amax()


class _LinearTokenLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: FunctionCtx,
        hidden: Tensor,
        weight: Tensor,
        target: Tensor,
        options: HeadOptions,
        grad_weight_out: Tensor | None,
        token_loss: TokenLoss,
        streams: Mapping[str, Tensor],
        token_weight: Tensor | None,
        denom: float | Tensor,
        names: list[str],
    ) -> tuple[Tensor, ...]:
        head = Head(hidden, weight, target, options)
        sums = _Sums(head, token_loss, streams, token_weight, denom)
        dtype = math_dtype(hidden)
        grad_hidden = torch.zeros_like(head.hidden, dtype=dtype) if ctx.needs_input_grad[0] else None
        grad_weight = grad_weight_out
        if grad_weight is None and ctx.needs_input_grad[1]:
            grad_weight = torch.zeros_like(weight, dtype=dtype)

        for piece in head.chunks(equal_on_all_ranks=True):
            chunk = head.chunk(piece)
            chunk.multiply()
            row = merge_shards(chunk.statistics(), options.temperature, head.group)
            derivatives = sums.add_differentiated(piece, row.logprob(), row.entropy() if options.want_entropy else None)
            chunk.add_gradients(row, *derivatives, grad_hidden, grad_weight)

        if grad_hidden is not None:
            grad_hidden = reduce_hidden_gradient(grad_hidden, head.group, options.sequence_parallel).to(hidden.dtype)
        ctx.weight = None if grad_weight_out is None else weight
        grad_weight = None if grad_weight is None or grad_weight_out is not None else grad_weight.to(weight.dtype)
        ctx.save_for_backward(grad_hidden, grad_weight)
        names.extend(sums.metrics)
        metrics = tuple(sums.metrics.values())
        ctx.mark_non_differentiable(*metrics)
        ctx.set_materialize_grads(False)
        return sums.loss / sums.denom, *metrics

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, upstream: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        grad_hidden, grad_weight = ctx.saved_tensors
        if ctx.weight is not None:
            message = (
                "linear_token_loss has already added dW to grad_weight_out: its loss must be the end of the graph "
                "(upstream gradient 1)"
            )
            torch._assert_async(upstream == 1, message)
            grad_weight = dummy_weight_gradient(ctx.weight)
        elif upstream is not None and (upstream.is_cuda or upstream != 1):
            # Skipping the multiplication saves a pass over both; comparing is free on a CPU, but would wait for a GPU.
            grad_hidden = None if grad_hidden is None else grad_hidden * upstream
            grad_weight = None if grad_weight is None else grad_weight * upstream
        return grad_hidden, grad_weight, *(None,) * 8
