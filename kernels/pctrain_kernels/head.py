"""One rank's part of the output head: options checked, rows chosen and cut into chunks, the softmax of a chunk and its gradient.

What `linear_logprob_entropy` and `linear_token_loss` have in common.
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

# Bytes of the logits of one chunk. In PyTorch a second buffer of the same size joins where entropy is wanted; the Triton kernels work in
# these fp32 logits alone, and leave their half precision gradient in the same memory.
# GPU: accumulating dW costs a pass over [V, H] a chunk (T 8192, V 152064, H 3584 by H200 bandwidth: 32 ms with 256 tokens a chunk,
# 2 ms with 4096), so as large as memory bears. The sum at that size in bf16, inputs, outputs and dW left out: two chunks of 4096 rows, of
# 2.49 GB each in turn; fp32 dX 0.12 GB; where rows are ignored, a chunk's hidden states 0.03 GB and their fp32 gradient 0.06 GB; cuBLAS
# workspace 0.03 GB: 2.73 GB. A chunk that fills the budget (2.68 GB) stays below 3 GB too.
# CPU: below 4 MiB the products are slow (few rows) and dW is passed over too often; above 32 MiB nothing is gained, with memory to lose
# (one thread of a Zen 4; V 8000, H 256, T 1024: 8 MiB 152 ms, 32 MiB 145 ms; V 32000, H 512, T 4096: 16 MiB 4.8 s, 32 and 64 MiB 4.4 s;
# `benchmarks/run_all.py --ops chunk_sizes`). Small models (V 320) have all their rows in one chunk.
GPU_LOGITS_BYTES = 5 * 2**29
CPU_LOGITS_BYTES = 2**25


@dataclass(frozen=True, kw_only=True)
class HeadOptions:
    """Keywords that the operations share; see `linear_logprob_entropy`."""

    vocab_start: int
    valid_vocab: int | None
    group: dist.ProcessGroup | None
    temperature: float
    ignore_index: int
    want_entropy: bool
    chunk_tokens: int | None
    sequence_parallel: bool

    def check(self, hidden: Tensor, weight: Tensor, target: Tensor, grad_weight_out: Tensor | None) -> None:
        """Raises ValueError where shapes, dtypes or options do not fit each other."""
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
        if not self.temperature > 0:
            raise ValueError(f"temperature must be above 0, got {self.temperature}")
        if self.valid_vocab is not None and self.valid_vocab < 1:
            raise ValueError(f"valid_vocab must be at least 1, got {self.valid_vocab}")
        if self.chunk_tokens is not None and self.chunk_tokens < 1:
            raise ValueError(f"chunk_tokens must be at least 1, got {self.chunk_tokens}")
        if grad_weight_out is not None and (
            grad_weight_out.shape != weight.shape or grad_weight_out.dtype != math_dtype(weight)
        ):
            raise ValueError(
                f"expected grad_weight_out {math_dtype(weight)} {list(weight.shape)}, "
                f"got {grad_weight_out.dtype} {list(grad_weight_out.shape)}"
            )
        if grad_weight_out is not None and torch.is_grad_enabled() and not weight.requires_grad:
            raise ValueError("grad_weight_out was given for a weight that does not require a gradient")


class Head(LabelledRows):
    """The tensors of one call. `hidden` is the whole [T, H] after the gather; columns of vocabulary padding are cut off `weight`.

    hidden [T, H], weight [k, H] with k <= V_l valid columns (0: the shard is all padding), target [n], rows [n] or None (all T rows).
    """

    def __init__(self, hidden: Tensor, weight: Tensor, target: Tensor, options: HeadOptions) -> None:
        super().__init__(target, options.ignore_index)
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
        """Cuts the n rows into pieces of near equal size, one empty piece for n = 0 (so that collectives are joined then too).

        `equal_on_all_ranks`: the loop's body holds a collective, so the size may depend only on what all ranks share.
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
        """Those rows. Their memory is taken over by the next call."""
        return Chunk(self, piece)

    def buffer(self, index: int, n: int) -> Tensor:
        """[n, k] in memory that all chunks share; uninitialised."""
        while len(self._buffers) <= index:
            self._buffers.append(torch.empty(0, dtype=math_dtype(self.hidden), device=self.hidden.device))
        buffer = self._buffers[index]
        if buffer.shape[0] < n:
            # Aligned rows: a GPU reads and multiplies them faster, and the valid columns of a padded vocabulary may be odd in number.
            stride = -(-self.columns // 16) * 16 if runs_triton(buffer) else self.columns
            buffer = self._buffers[index] = buffer.new_empty(n, stride)[:, : self.columns]
        return buffer[:n]


class Chunk:
    """Rows `piece` of a head: their logits, the softmax of them, and what their gradient adds to those of hidden states and weight."""

    def __init__(self, head: Head, piece: slice) -> None:
        self.head = head
        self.rows = piece if head.rows is None else head.rows[piece]
        self.hidden = operand(head.hidden[piece] if head.rows is None else head.hidden.index_select(0, self.rows))
        self.target = head.target[piece]

    def multiply(self, shift: Tensor | None = None) -> None:
        """The matrix product, and the softmax over it; `shift` as in `softmax_of`. Does nothing where the shard has no valid columns."""
        head, options, n = self.head, self.head.options, self.target.shape[0]
        if head.columns:
            self.softmax = softmax_of(
                product(self.hidden, head.weight.t(), out=head.buffer(0, n)),
                self.target - options.vocab_start if options.vocab_start else self.target,
                temperature=options.temperature, want_entropy=options.want_entropy, sharded=head.group is not None,
                scratch=lambda: head.buffer(1, n), shift=shift,
            )  # fmt: skip

    def statistics(self) -> RowStatistics:
        """This shard's part of the statistics of the rows, after `multiply`."""
        if self.head.columns == 0:
            return empty_shard(self.hidden.new_full(self.target.shape, -torch.inf, dtype=math_dtype(self.hidden)),
                               self.head.options.want_entropy)  # fmt: skip
        return self.softmax.statistics()

    def add_gradients(
        self,
        row: RowStatistics,
        dlogprob: Tensor,
        dentropy: Tensor | None,
        grad_hidden: Tensor | None,
        grad_weight: Tensor | None,
    ) -> None:
        """Writes these rows of `grad_hidden` [T, H] and adds to `grad_weight` [V_l, H], both full precision.

        row: statistics of the whole rows; dlogprob, dentropy [n]: derivatives of the loss (dentropy None: not needed).
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
    """What backward returns after dW went into `grad_weight_out`.

    Megatron's DDP asserts that there is a gradient when it overlaps its reduction, and ignores its value where `grad_added_to_main_grad`
    is set, unless `zero_out_wgrad` is (tied embeddings): then it adds it.
    """
    weight.grad_added_to_main_grad = True
    return torch.zeros_like(weight) if getattr(weight, "zero_out_wgrad", False) else torch.empty_like(weight)
