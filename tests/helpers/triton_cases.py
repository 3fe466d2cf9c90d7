"""Cases of the Triton kernels and the checks of one case against float64, in Triton's interpreter."""

from __future__ import annotations

import itertools
import mmap
from dataclasses import dataclass
from unittest import mock

import torch
from torch import Tensor

from pctrain_kernels import (
    linear_logprob_entropy,
    linear_token_loss,
    merge,
    reference,
)
from pctrain_kernels.merge import RowStatistics, empty_shard
from pctrain_kernels.triton_softmax import TritonSoftmax, launch_shape
from tests.helpers.kernel_inputs import (
    LOGPROB_TOLERANCE,
    double,
    make_inputs,
    relative,
)

# Relative to the norm of the gradient. fp32: the rounding of exp and of the row sums, a few units of 6e-8. Half
# precision: one rounding of the result, which is a truncation to 8 bits in the interpreter's bf16.
GRADIENT_TOLERANCE = {torch.float32: 1e-6, torch.float16: 5e-4, torch.bfloat16: 8e-3}

BLOCK = launch_shape(10**6)[0]

GUARD = 77.0  # fills the memory between the rows, and must still be there afterwards


def pairwise(axes: dict[str, list]) -> list[dict]:
    """Return combinations in which any two values of any two axes meet; greedy and deterministic."""
    names = list(axes)
    missing = {
        ((a, x), (b, y))
        for a, b in itertools.combinations(names, 2)
        for x in range(len(axes[a]))
        for y in range(len(axes[b]))
    }
    every = [
        dict(zip(names, indices, strict=True))
        for indices in itertools.product(*(range(len(values)) for values in axes.values()))
    ]

    def missing_pairs(row: dict) -> set:
        return set(itertools.combinations(row.items(), 2)) & missing

    chosen = []
    while missing:
        best = max(every, key=lambda row: len(missing_pairs(row)))
        missing -= missing_pairs(best)
        chosen.append({name: axes[name][index] for name, index in best.items()})
    return chosen


def name_of(options: dict) -> str:
    return "-".join(str(value).removeprefix("torch.") for value in options.values())


@dataclass(frozen=True)
class Case:
    """A block of logits and the operations to check on it. `shards` are the columns at which the vocabulary is cut."""

    dtype: torch.dtype = torch.float32
    gradient: torch.dtype = torch.float32
    vocab: int = 127
    tokens: int = 3
    temperature: float = 1.0
    upstream: str = "both"
    layout: str = "contiguous"
    shards: tuple[int, ...] = ()

    def values(self) -> tuple[Tensor, Tensor]:
        """Return logits [T, V] and targets [T], some of them on the edges of shards."""
        generator = torch.Generator().manual_seed(5)
        logits = 3 * torch.randn(self.tokens, self.vocab, generator=generator)
        target = torch.randint(self.vocab, (self.tokens,), generator=generator)
        edges = [edge for cut in (0, *self.shards, self.vocab) for edge in (cut - 1, cut) if 0 <= edge < self.vocab]
        for row, edge in zip(range(self.tokens), edges, strict=False):
            target[row] = edge
        return logits.to(self.dtype), target


def laid_out(logits: Tensor, layout: str) -> tuple[Tensor, Tensor]:
    """Return (memory [rows, columns] filled with GUARD, the logits in it); 4096 guarded columns follow the last row."""
    rows, columns = logits.shape
    top, left, right = {"contiguous": (0, 0, 0), "padded": (0, 0, 21), "sliced": (2, 5, 8)}[layout]
    width = left + columns + right
    memory = torch.full((top + rows + -(-4096 // width), width), GUARD, dtype=logits.dtype)
    inner = memory[top : top + rows, left : left + columns]
    return memory, inner.copy_(logits)


def upstream_of(case: Case) -> tuple[Tensor, Tensor | None]:
    """Return dlogprob and dentropy [T] of random sign."""
    signs = torch.randn(2, case.tokens, generator=torch.Generator().manual_seed(6))
    return signs[0] * (case.upstream != "entropy"), None if "logprob" in case.upstream else signs[1]


def merged(parts: list[RowStatistics], temperature: float) -> RowStatistics:
    """Merge shards as `merge_shards` does, without a process group."""
    stacked = torch.stack([torch.stack([value for value in part if value is not None]) for part in parts])
    with mock.patch.object(merge, "gather_ranks", return_value=stacked):
        return merge.merge_shards(parts[0], temperature, group=object())


def largest_error(got: Tensor, want: Tensor) -> float:
    return float((got - want).detach().abs().max()) if want.numel() else 0.0


def check(case: Case, values: tuple[Tensor, Tensor] | None = None, kernels: type = TritonSoftmax) -> dict[str, float]:
    """Assert that statistics and gradient equal those in float64; return the errors."""
    source, target = values or case.values()
    want_entropy = case.upstream != "logprob alone"
    exact = source.double().requires_grad_()
    log_p = torch.log_softmax(exact / case.temperature, 1)
    want_logprob = log_p.gather(1, target[:, None]).squeeze(1)
    want_entropies = -(log_p.exp() * log_p).sum(1)

    memory, logits = laid_out(source, case.layout)
    untouched = torch.ones_like(memory, dtype=torch.bool)
    cuts = (0, *case.shards, case.vocab)
    blocks, parts = [], []
    for start, end in itertools.pairwise(cuts):
        part = logits[:, start:end]
        block = kernels(part, target - start, case.temperature, want_entropy) if end > start else None
        blocks.append(block)
        none = torch.full((case.tokens,), -torch.inf)
        parts.append(empty_shard(none, want_entropy) if block is None else block.statistics())
    row = merged(parts, case.temperature) if case.shards else parts[0]
    assert torch.equal(row.max, source.float().amax(1))
    errors = {"logprob": largest_error(row.logprob(), want_logprob)}
    if want_entropy:
        errors["entropy"] = largest_error(row.entropy(), want_entropies)
    assert all(error < LOGPROB_TOLERANCE for error in errors.values()), errors  # NaN is not below either

    dlogprob, dentropy = upstream_of(case)
    objective = (want_logprob * dlogprob).sum() + (0 if dentropy is None else (want_entropies * dentropy).sum())
    (want_gradient,) = torch.autograd.grad(objective, exact)
    got = []
    for (start, end), block in zip(itertools.pairwise(cuts), blocks, strict=True):
        if block is not None:
            got.append(block.gradient(row, dlogprob, dentropy, case.gradient))
            assert got[-1].dtype == case.gradient and got[-1].data_ptr() == logits[:, start:end].data_ptr()
            assert got[-1].stride() == (logits.stride(0) * logits.dtype.itemsize // case.gradient.itemsize, 1)
    errors["gradient"] = relative(torch.cat(got, 1), want_gradient)
    assert errors["gradient"] < GRADIENT_TOLERANCE[case.gradient], errors

    top, left = divmod(logits.storage_offset(), memory.shape[1])
    untouched[top : top + case.tokens, left : left + case.vocab] = False
    assert (memory[untouched] == GUARD).all()
    return errors


BLOCKS = Case(gradient=torch.bfloat16, vocab=2 * BLOCK + 811, tokens=2, layout="padded")  # rows of three blocks


def confident_case(case: Case, lead: float) -> tuple[Tensor, Tensor]:
    logits, target = case.values()
    return logits.scatter(1, target[:, None], lead), target


def check_confident(kernels: type = TritonSoftmax) -> None:
    """Check that the gradient 1 - p keeps its relative precision for p of the target from 0.9999 to 1 - 1e-11.

    (fp16 has no numbers so small.)
    """
    for lead in (20.0, 27.0, 36.0):
        for dtype in (torch.float32, torch.bfloat16):
            case = Case(gradient=dtype, upstream="logprob alone")
            logits, target = confident_case(case, lead)
            if lead < 30:  # beyond this, autograd's own difference is too coarse
                check(case, (logits, target), kernels)
            rest = logits.double().exp().scatter(1, target[:, None], 0).sum(1, keepdim=True)
            want = rest / (rest + torch.tensor(lead).double().exp())
            assert want.min() > 0 and want.max() < 1e-3
            block = kernels(logits, target, 1.0, False)
            got = (
                block.gradient(block.statistics(), torch.ones(case.tokens), None, dtype)
                .double()
                .gather(1, target[:, None])
            )
            torch.testing.assert_close(got, want, rtol=GRADIENT_TOLERANCE[dtype], atol=0)


def check_beyond_two_to_the_31(kernels: type = TritonSoftmax) -> None:
    """Return three rows of bf16 logits 2^30 elements apart, in memory of which only those pages are ever touched.

    The view begins 2^31 elements after the memory's start, so an offset that wraps would read zeros, not crash.
    """
    stride, columns = 2**30 + 16, 40
    no_reserve = 0x4000  # MAP_NORESERVE
    pages = mmap.mmap(-1, 2 * (2**31 + 3 * stride), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | no_reserve)
    logits = torch.frombuffer(pages, dtype=torch.bfloat16).as_strided((3, columns), (stride, 1), 2**31)
    values = torch.randn(3, columns, generator=torch.Generator().manual_seed(1)).bfloat16()
    logits.copy_(values)
    block = kernels(logits, torch.tensor([0, 7, 39]), 1.0, True)
    row = block.statistics()
    want = torch.log_softmax(values.double(), 1)
    torch.testing.assert_close(row.logprob().double(), want[[0, 1, 2], [0, 7, 39]], rtol=0, atol=LOGPROB_TOLERANCE)
    gradient = block.gradient(row, torch.ones(3), None, torch.bfloat16)
    one_hot = torch.zeros(3, columns).scatter(1, torch.tensor([[0], [7], [39]]), 1)
    assert relative(gradient.clone(), one_hot - want.exp()) < GRADIENT_TOLERANCE[torch.bfloat16]
    assert relative(logits.clone(), one_hot - want.exp()) < GRADIENT_TOLERANCE[torch.bfloat16]


class GpuProducts:
    """Accept half precision operands of any layout, as a GPU's matrix products do, and record them."""

    def __init__(self) -> None:
        self.dlogits: list[Tensor] = []

    def product(self, a: Tensor, b: Tensor, out: Tensor) -> Tensor:
        self._see(a)
        return torch.mm(a.float(), b.float(), out=out)

    def add_product(self, accumulator: Tensor, a: Tensor, b: Tensor) -> None:
        self._see(a.t())
        accumulator.addmm_(a.float(), b.float())

    def _see(self, a: Tensor) -> None:
        if (
            a.dtype != torch.float32
            and a.storage_offset() == 0
            and a.untyped_storage().nbytes() > a.numel() * a.dtype.itemsize
        ):
            self.dlogits.append(a)


def head_inputs(options: dict) -> tuple[Tensor, Tensor, Tensor]:
    ignored = {"none": 0.0, "some": 0.4, "all": 1.1}[options["ignored"]]
    hidden, weight, target = make_inputs(options["tokens"], options["vocab"], ignored=ignored)
    made = []
    for tensor in (hidden, weight):
        tensor = tensor.detach().to(options["dtype"])
        rows, width = tensor.shape
        if options["layout"] != "contiguous":
            top, left = (2, 3) if options["layout"] == "sliced" else (0, 0)
            tensor = torch.zeros(rows + top, width + 9, dtype=tensor.dtype)[top:, left : left + width].copy_(tensor)
        made.append(tensor.requires_grad_())
    return *made, target


def check_head(options: dict) -> dict[str, float]:
    """Check both operations and their gradients against float64, also dW in fp32 (`grad_weight_out`)."""
    hidden, weight, target = head_inputs(options)
    tokens, chunk = target.shape[0], {"one": 1, "odd": 7, "all": None}[options["chunk"]]
    temperature, tolerance = options["temperature"], GRADIENT_TOLERANCE[options["dtype"]]
    signs = torch.randn(2, tokens, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    signs[0] *= options["upstream"] != "entropy"
    signs[1] *= options["upstream"] != "logprob"
    exact = double(hidden, weight)
    want = reference.linear_logprob_entropy(exact[0], exact[1], target, temperature=temperature)
    want_gradients = torch.autograd.grad((signs[0] * want[0]).sum() + (signs[1] * want[1]).sum(), exact)

    got = linear_logprob_entropy(hidden, weight, target, temperature=temperature, chunk_tokens=chunk)
    weights = signs.float()
    got_gradients = torch.autograd.grad((weights[0] * got[0]).sum() + (weights[1] * got[1]).sum(), (hidden, weight))
    main_grad = torch.zeros(weight.shape)
    loss, _ = linear_token_loss(
        hidden,
        weight,
        target,
        lambda logprob, entropy, streams: (streams["a"] * logprob + streams["b"] * entropy, {}),
        streams={"a": weights[0], "b": weights[1]},
        denom=1,
        temperature=temperature,
        chunk_tokens=chunk,
        grad_weight_out=main_grad,
    )
    loss.backward()
    errors = {
        "logprob": largest_error(got[0], want[0]),
        "entropy": largest_error(got[1], want[1]),
        "loss": largest_error(loss, (signs[0] * want[0] + signs[1] * want[1]).sum()) / max(1, tokens),
    }
    assert all(error < LOGPROB_TOLERANCE for error in errors.values()), errors
    # A gradient returned in half precision is rounded once more.
    for name, value, wanted, bound in (
        ("dX", got_gradients[0], want_gradients[0], 2 * tolerance),
        ("dW", got_gradients[1], want_gradients[1], 2 * tolerance),
        ("dX of the loss", hidden.grad, want_gradients[0], 2 * tolerance),
        ("dW in main_grad", main_grad, want_gradients[1], tolerance),
    ):
        if wanted.norm() > 1e-12:
            errors[name] = relative(value, wanted)
            assert errors[name] < bound, f"{name}: {errors}"
        else:  # one column, or nothing labelled
            assert value.abs().sum() < 1e-4 * tolerance
    return errors


EXAMPLE = {
    "dtype": torch.bfloat16,
    "vocab": 127,
    "tokens": 17,
    "temperature": 1.0,
    "ignored": "some",
    "upstream": "both",
    "layout": "contiguous",
    "chunk": "odd",
}
