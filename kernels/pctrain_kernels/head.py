"""One rank's part of the output head, which `linear_logprob_entropy` and `linear_token_loss` share.

It checks the options, chooses rows and cuts them into chunks, and computes the softmax of a chunk and its gradient.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from pctrain_kernels.backend import runs_triton
from pctrain_kernels.matmul import add_product, math_dtype, operand, product
from pctrain_kernels.merge import RowStatistics, empty_shard
from pctrain_kernels.parallel import gather_sequence, largest_shard
from pctrain_kernels.rows import LabelledRows
from pctrain_kernels.softmax import softmax_of

# Bytes of the logits of one chunk. PyTorch needs a second buffer of the same size if entropy is wanted. The Triton
# kernels work in these fp32 logits alone, and leave their half precision gradient in the same memory.
#
# GPU: accumulating dW costs one pass over [V, H] per chunk (T 8192, V 152064, H 3584 at H200 bandwidth: 32 ms with 256
# tokens per chunk, 2 ms with 4096), so chunks are as large as memory allows. At that size, in bf16 and without inputs,
# outputs and dW, peak memory is 2.73 GB: two chunks of 4096 rows of 2.49 GB, one after the other; fp32 dX 0.12 GB; with
# ignored rows, a chunk's hidden states 0.03 GB and their fp32 gradient 0.06 GB; cuBLAS workspace 0.03 GB. A chunk that
# fills the budget (2.68 GB) stays below 3 GB too.
#
# CPU: below 4 MiB the products are slow (few rows) and dW is passed over too often; above 32 MiB nothing is gained (one
# thread of a Zen 4; V 8000, H 256, T 1024: 8 MiB 152 ms, 32 MiB 145 ms; V 32000, H 512, T 4096: 16 MiB 4.8 s, 32 and
# 64 MiB 4.4 s; `benchmarks/run_all.py --ops chunk_sizes`). Small models (V 320) have all their rows in one chunk.
GPU_LOGITS_BYTES = 5 * 2**29
CPU_LOGITS_BYTES = 2**25


@dataclass(frozen=True, kw_only=True)
class HeadOptions:
    """The keywords that the operations share; `linear_logprob_entropy` explains them."""

    vocab_start: int
    valid_vocab: int | None
    group: dist.ProcessGroup | None
    temperature: float
    ignore_index: int
    want_entropy: bool
    chunk_tokens: int | None
    sequence_parallel: bool
    rows: Tensor | None

    def check(self, hidden: Tensor, weight: Tensor, target: Tensor, grad_weight_out: Tensor | None) -> None:
        """Raise ValueError if shapes, dtypes or options do not fit each other."""
        self._check_tensors(hidden, weight, target)
        if not self.temperature > 0:
            raise ValueError(f"temperature must be above 0, got {self.temperature}")
        if self.valid_vocab is not None and self.valid_vocab < 1:
            raise ValueError(f"valid_vocab must be at least 1, got {self.valid_vocab}")
        if self.chunk_tokens is not None and self.chunk_tokens < 1:
            raise ValueError(f"chunk_tokens must be at least 1, got {self.chunk_tokens}")
        if grad_weight_out is not None:
            _check_grad_weight_out(weight, grad_weight_out)

    def _check_tensors(self, hidden: Tensor, weight: Tensor, target: Tensor) -> None:
        if hidden.ndim != 2 or weight.ndim != 2 or hidden.shape[1] != weight.shape[1]:
            raise ValueError(
                f"expected hidden [T, H] and weight [V, H], got {list(hidden.shape)} and {list(weight.shape)}"
            )
        if hidden.dtype != weight.dtype or not hidden.dtype.is_floating_point:
            raise ValueError(
                f"expected hidden and weight of one floating point dtype, got {hidden.dtype} and {weight.dtype}"
            )
        if self.sequence_parallel and self.group is None:
            raise ValueError("sequence_parallel=True needs the group over which the sequence is split")
        tokens = hidden.shape[0] * (dist.get_world_size(self.group) if self.sequence_parallel else 1)
        if target.shape != (tokens,) or target.dtype != torch.int64:
            raise ValueError(f"expected target int64 [{tokens}], got {target.dtype} {list(target.shape)}")
        rows = self.rows
        if rows is not None and (rows.ndim != 1 or rows.dtype != torch.int64 or rows.shape[0] > tokens):
            raise ValueError(f"expected rows int64 [at most {tokens}], got {rows.dtype} {list(rows.shape)}")


def _check_grad_weight_out(weight: Tensor, grad_weight_out: Tensor) -> None:
    if grad_weight_out.shape != weight.shape or grad_weight_out.dtype != math_dtype(weight):
        raise ValueError(
            f"expected grad_weight_out {math_dtype(weight)} {list(weight.shape)}, "
            f"got {grad_weight_out.dtype} {list(grad_weight_out.shape)}"
        )
    if torch.is_grad_enabled() and not weight.requires_grad:
        raise ValueError("grad_weight_out was given for a weight that does not require a gradient")


class Head(LabelledRows):
    """The tensors of one call: hidden [T, H] after the gather, weight [k, H], target [n], rows [n] or None for all T.

    Columns of vocabulary padding are cut off `weight`: k <= V_l of its columns are valid (0 if the shard is all
    padding).
    """

    def __init__(self, hidden: Tensor, weight: Tensor, target: Tensor, options: HeadOptions) -> None:
        super().__init__(target, options.ignore_index, options.rows)
        self.options = options
        group = options.group
        self.group = None if group is None or dist.get_world_size(group) == 1 else group
        self.hidden = (
            gather_sequence(hidden, self.group) if options.sequence_parallel and self.group is not None else hidden
        )
        self.full_weight = weight
        end = weight.shape[0] if options.valid_vocab is None else options.valid_vocab - options.vocab_start
        self.weight = operand(weight[: max(0, end)])
        self.columns = self.weight.shape[0]
        self.check_targets(options.vocab_start, self.columns, options.valid_vocab, sharded=self.group is not None)
        self._buffers: list[Tensor] = []

    def chunks(self, *, equal_on_all_ranks: bool) -> Iterator[slice]:
        """Cut the n rows into pieces of nearly equal size; n = 0 gives one empty piece, so that collectives match.

        With `equal_on_all_ranks` the loop's body has a collective, so the size depends only on what all ranks share.
        """
        n = self.target.shape[0]
        size = self.options.chunk_tokens
        if size is None:
            columns = largest_shard(self.full_weight, self.group) if equal_on_all_ranks else self.columns
            budget = GPU_LOGITS_BYTES if self.hidden.is_cuda else CPU_LOGITS_BYTES
            size = max(1, budget // (math_dtype(self.hidden).itemsize * max(1, columns)))
        size = -(-n // max(1, -(-n // size)))
        for start in range(0, max(1, n), max(1, size)):
            yield slice(start, min(n, start + size))

    def chunk(self, piece: slice) -> Chunk:
        """Return the rows of a piece. The next call reuses their memory."""
        return Chunk(self, piece)

    def buffer(self, index: int, n: int) -> Tensor:
        """Return an uninitialized [n, k] in memory that all chunks share."""
        while len(self._buffers) <= index:
            self._buffers.append(torch.empty(0, dtype=math_dtype(self.hidden), device=self.hidden.device))
        buffer = self._buffers[index]
        if buffer.shape[0] < n:
            # A GPU reads and multiplies aligned rows faster, and a padded vocabulary may have an odd number of valid
            # columns.
            stride = -(-self.columns // 16) * 16 if runs_triton(buffer) else self.columns
            buffer = self._buffers[index] = buffer.new_empty(n, stride)[:, : self.columns]
        return buffer[:n]


class Chunk:
    """Rows of a head: their logits, their softmax, and their part of the gradients of hidden states and weight."""

    def __init__(self, head: Head, piece: slice) -> None:
        self.head = head
        self.rows = piece if head.rows is None else head.rows[piece]
        self.hidden = operand(head.hidden[piece] if head.rows is None else head.hidden.index_select(0, self.rows))
        self.target = head.target[piece]

    def multiply(self, shift: Tensor | None = None) -> None:
        """Compute logits and softmax, unless the shard has no valid columns; `softmax_of` explains `shift`."""
        head = self.head
        options = head.options
        n = self.target.shape[0]
        if head.columns:
            self.softmax = softmax_of(
                product(self.hidden, head.weight.t(), out=head.buffer(0, n)),
                self.target - options.vocab_start if options.vocab_start else self.target,
                temperature=options.temperature,
                want_entropy=options.want_entropy,
                sharded=head.group is not None,
                scratch=lambda: head.buffer(1, n),
                shift=shift,
            )

    def statistics(self) -> RowStatistics:
        """Return this shard's part of the statistics of the rows, after `multiply`."""
        if self.head.columns == 0:
            none = self.hidden.new_full(self.target.shape, -torch.inf, dtype=math_dtype(self.hidden))
            return empty_shard(none, self.head.options.want_entropy)
        return self.softmax.statistics()

    def add_gradients(
        self,
        row: RowStatistics,
        dlogprob: Tensor,
        dentropy: Tensor | None,
        grad_hidden: Tensor | None,
        grad_weight: Tensor | None,
    ) -> None:
        """Write these rows of `grad_hidden` [T, H] and add to `grad_weight` [V_l, H], both in full precision.

        `row` has the statistics of the whole rows; `dlogprob` and `dentropy` [n] are derivatives of the loss (dentropy
        is None if it is not needed).
        """
        if self.head.columns == 0:
            return
        dlogits = self.softmax.gradient(row, dlogprob, dentropy, self.head.weight.dtype)
        if grad_hidden is not None:
            if self.head.rows is None:
                product(dlogits, self.head.weight, out=grad_hidden[self.rows])
            else:
                part = grad_hidden.new_empty(self.target.shape[0], grad_hidden.shape[1])
                grad_hidden.index_copy_(0, self.rows, product(dlogits, self.head.weight, out=part))
        if grad_weight is not None:
            add_product(grad_weight[: self.head.columns], dlogits.t(), self.hidden)


def dummy_weight_gradient(weight: Tensor) -> Tensor:
    """Return the gradient that backward hands to autograd after dW went into `grad_weight_out`.

    Megatron's DDP asserts that there is a gradient when it overlaps its reduction. It ignores the value if
    `grad_added_to_main_grad` is set, and adds it if `zero_out_wgrad` is set (tied embeddings).
    """
    weight.grad_added_to_main_grad = True
    return torch.zeros_like(weight) if getattr(weight, "zero_out_wgrad", False) else torch.empty_like(weight)
