"""The softmax of a block of logits in two Triton kernels.

One kernel reads the logits, the other reads them again and writes their gradient in place. Between the two only the
statistics of the rows are kept. One program works on one row, block after block; sums have a fixed order, so results
are the same every time. Arithmetic is fp32; the gradient is rounded once, when it is stored.

Written for Triton 3.6 to 3.9: block sizes come from a table, not from autotuning; scalars are cast by `tl.cast`,
because an integer argument equal to 1 is a constant without methods.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from pctrain_kernels.merge import RowStatistics, target_gradient


def launch_shape(columns: int) -> tuple[int, int]:
    """Return the columns of a block and the warps of a program.

    At most 16 columns per thread let three programs fit in the registers of an SM.
    """
    block = min(4096, max(128, triton.next_power_of_2(columns)))
    return block, max(1, block // 512)


class TritonSoftmax:
    """The `Softmax` of logits [n, k] in fp32, bf16 or fp16, with contiguous columns and any row stride."""

    def __init__(
        self, logits: Tensor, column: Tensor, temperature: float, want_entropy: bool, keep: bool = False
    ) -> None:
        if logits.ndim != 2 or (logits.stride(1) != 1 and logits.shape[1] > 1):
            raise ValueError(
                f"expected logits [n, k] with contiguous columns, got {list(logits.shape)}, strides {logits.stride()}"
            )
        self.logits = logits
        self.keep = keep
        self.column = column.contiguous()
        self.temperature = float(temperature)
        self.want_entropy = want_entropy

    def statistics(self) -> RowStatistics:
        """Return this shard's part of the statistics of the rows, each [n]."""
        rows, columns = self.logits.shape
        row = torch.empty(4 if self.want_entropy else 3, rows, dtype=torch.float32, device=self.logits.device)
        block, warps = launch_shape(columns)
        with torch.cuda.device_of(self.logits):
            statistics_kernel[(rows,)](
                self.logits,
                self.column,
                row[0],
                row[1],
                row[2],
                row[-1],
                self.logits.stride(0),
                columns,
                self.temperature,
                1.0 / self.temperature,
                want_entropy=self.want_entropy,
                block=block,
                num_warps=warps,
                enable_fp_fusion=True,
            )
        return RowStatistics(row[0], row[1], row[2] if self.want_entropy else None, row[-1])

    def gradient(
        self,
        row: RowStatistics,
        dlogprob: Tensor,
        dentropy: Tensor | None,
        dtype: torch.dtype,
        *,
        out: Tensor | None = None,
    ) -> Tensor:
        """Return dlogits [n, k]; see `Softmax`."""
        # dlogits = e^y (constant + slope y), with y from the maximum of the whole row; the target has another formula
        # (`target_gradient`).
        scale = -1.0 / (row.sum() * self.temperature)  # e^y -> -p / temperature
        constant = scale * (dlogprob if dentropy is None else dlogprob - dentropy * row.mean_shifted())
        slope = constant if dentropy is None else scale * dentropy
        at_target = target_gradient(row, dlogprob, dentropy, self.temperature)
        rows, columns = self.logits.shape
        gradient = self._memory(dtype, out)
        block, warps = launch_shape(columns)
        with torch.cuda.device_of(self.logits):
            gradient_kernel[(rows,)](
                self.logits,
                gradient,
                self.column,
                row.max.contiguous(),
                constant,
                slope,
                at_target,
                self.logits.stride(0),
                gradient.stride(0),
                columns,
                1.0 / self.temperature,
                want_entropy=dentropy is not None,
                block=block,
                num_warps=warps,
                enable_fp_fusion=True,
            )
        return gradient if out is None or gradient is out else out.copy_(gradient)

    def _memory(self, dtype: torch.dtype, out: Tensor | None) -> Tensor:
        """Return [n, k] for the gradient: the caller's `out`, else the logits' memory, else new memory.

        New memory is needed if the logits are narrower than `dtype` or belong to the caller.
        """
        if out is not None and (out.stride(1) == 1 or out.shape[1] == 1):
            return out
        if self.keep or dtype.itemsize > self.logits.dtype.itemsize:
            return torch.empty(self.logits.shape, dtype=dtype, device=self.logits.device)
        return in_memory_of(self.logits, dtype)


def in_memory_of(logits: Tensor, dtype: torch.dtype) -> Tensor:
    """Return [n, k] in `dtype`, each row at the front of its row of logits, whose dtype must not be narrower."""
    ratio = logits.dtype.itemsize // dtype.itemsize
    rows, columns = logits.shape
    return torch.empty(0, dtype=dtype, device=logits.device).set_(
        logits.untyped_storage(), logits.storage_offset() * ratio, (rows, columns), (logits.stride(0) * ratio, 1)
    )


# One value per row is read or written through these pointers. Their alignment follows the number of rows, and is no
# reason to compile again.
@triton.jit(do_not_specialize_on_alignment=["column", "out_max", "out_rest", "out_shifted", "out_target"])
def statistics_kernel(
    logits: tl.tensor,
    column: tl.tensor,
    out_max: tl.tensor,
    out_rest: tl.tensor,
    out_shifted: tl.tensor,
    out_target: tl.tensor,
    stride: tl.tensor,
    columns: tl.tensor,
    temperature: tl.tensor,
    inverse_temperature: tl.tensor,
    want_entropy: tl.constexpr,
    block: tl.constexpr,
) -> None:
    """Compute a row's maximum and its sums of e^y and e^y y without the target, in one pass (merge.py).

    The sums are kept per column of the block, relative to the maximum so far, and added up once, at the end. A NaN
    enters the sums (or `out_target`) even if the maximum ignores it, as on a GPU; an infinite logit makes y NaN.
    """
    row = tl.cast(tl.program_id(0), tl.int64)
    logits += row * stride
    target = tl.load(column + row)
    owned = (target >= 0) & (target < columns)
    target = tl.cast(tl.where(owned, target, -1), tl.int32)
    maximum = tl.full([], -float("inf"), tl.float32)
    rest = tl.zeros([block], tl.float32)
    shifted = tl.zeros([block], tl.float32)
    for start in range(0, columns, block):
        index = start + tl.arange(0, block)
        inside = index < columns
        x = tl.load(logits + index, mask=inside, other=-float("inf")).to(tl.float32)
        grown = tl.maximum(maximum, tl.max(x, axis=0))
        # Nothing but -inf so far: y is -inf then, not NaN.
        origin = tl.where(grown == -float("inf"), 0.0, grown)
        # The sums are zero before the first finite logit, and vanish beyond a distance of 200: a bound, because -inf
        # times 0 is NaN.
        distance = tl.maximum((maximum - origin) * inverse_temperature, -200.0)
        decay = tl.exp(distance)
        y = (x - origin) * inverse_temperature
        counted = inside & (index != target)
        e = tl.where(counted, tl.exp(y), 0.0)
        if want_entropy:
            shifted = decay * (shifted + distance * rest) + tl.where(counted, e * y, 0.0)
        rest = decay * rest + e
        maximum = grown
    y_target = tl.div_rn(
        tl.load(logits + target, mask=owned, other=-float("inf")).to(tl.float32) - maximum, temperature
    )
    total = tl.sum(rest, axis=0)
    tl.store(out_max + row, maximum)
    # A row of -inf alone has no softmax.
    tl.store(out_rest + row, tl.where(maximum == -float("inf"), float("nan"), total))
    if want_entropy:
        tl.store(out_shifted + row, tl.sum(shifted, axis=0))
    tl.store(out_target + row, y_target)


@triton.jit(do_not_specialize_on_alignment=["column", "row_max", "row_constant", "row_slope", "row_target"])
def gradient_kernel(
    logits: tl.tensor,
    gradient: tl.tensor,
    column: tl.tensor,
    row_max: tl.tensor,
    row_constant: tl.tensor,
    row_slope: tl.tensor,
    row_target: tl.tensor,
    stride: tl.tensor,
    gradient_stride: tl.tensor,
    columns: tl.tensor,
    inverse_temperature: tl.tensor,
    want_entropy: tl.constexpr,
    block: tl.constexpr,
) -> None:
    """Write gradient = e^y (constant + slope y), and `row_target` in the target's column.

    A row's gradient may start where its logits do. Blocks ascend, so what a store overwrites has been read: before this
    block, or in it by another thread, hence the barrier.
    """
    row = tl.cast(tl.program_id(0), tl.int64)
    logits += row * stride
    gradient += row * gradient_stride
    target = tl.load(column + row)
    target = tl.cast(tl.where((target >= 0) & (target < columns), target, -1), tl.int32)
    maximum = tl.load(row_max + row)
    constant = tl.load(row_constant + row)
    slope = tl.load(row_slope + row)
    at_target = tl.load(row_target + row)
    for start in range(0, columns, block):
        index = start + tl.arange(0, block)
        inside = index < columns
        x = tl.load(logits + index, mask=inside, other=0.0).to(tl.float32)
        y = (x - maximum) * inverse_temperature
        factor = constant
        if want_entropy:
            factor = constant + slope * y
        value = tl.where(index == target, at_target, tl.exp(y) * factor)
        tl.debug_barrier()
        tl.store(gradient + index, tl.cast(value, gradient.dtype.element_ty), mask=inside)
