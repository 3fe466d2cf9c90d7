"""The Triton kernels beneath `softmax_of` against float64, on a CPU in Triton's interpreter.

The interpreter is chosen when Triton is imported, so `test_interpreted.py` runs this file in a process of its own. It takes some
milliseconds a row and block: hence few rows. It rounds fp32 to bf16 by truncation, and knows neither threads nor barriers.
"""

from __future__ import annotations

import importlib.util
import itertools
import mmap
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from unittest import mock

import pytest
import torch
from torch import Tensor

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("run by test_interpreted.py", allow_module_level=True)

from pctrain_kernels import (
    head,
    linear_logprob,
    linear_logprob_entropy,
    linear_token_loss,
    merge,
    reference,
    softmax,
    triton_softmax,
)
from pctrain_kernels.merge import RowStatistics, empty_shard
from pctrain_kernels.softmax import TorchSoftmax, softmax_of
from pctrain_kernels.triton_softmax import TritonSoftmax, launch_shape
from tests.helpers.kernel_inputs import (
    LOGPROB_TOLERANCE,
    check_padding_columns_take_no_part,
    clipped_policy,
    double,
    make_inputs,
    make_streams,
    relative,
)

# Relative to the norm of the gradient. fp32: the rounding of exp and of the row sums, a few units of 6e-8. Half precision: the one
# rounding of the result, which is a truncation to 8 bits in the interpreter's bf16.
GRADIENT_TOLERANCE = {torch.float32: 1e-6, torch.float16: 5e-4, torch.bfloat16: 8e-3}
BLOCK = launch_shape(10**6)[0]
GUARD = 77.0  # what lies between the rows, and must lie there after


def pairwise(axes: dict[str, list]) -> list[dict]:
    """Combinations in which any two values of any two axes meet; greedy, and the same every time."""
    names = list(axes)
    missing = {
        ((a, x), (b, y)) for a, b in itertools.combinations(names, 2) for x in range(len(axes[a])) for y in range(len(axes[b]))
    }  # fmt: skip
    every = [
        dict(zip(names, indices, strict=True))
        for indices in itertools.product(*(range(len(values)) for values in axes.values()))
    ]
    chosen = []
    while missing:
        pairs_of = lambda row: {pair for pair in itertools.combinations(row.items(), 2)} & missing  # noqa: E731
        best = max(every, key=lambda row: len(pairs_of(row)))
        missing -= pairs_of(best)
        chosen.append({name: axes[name][index] for name, index in best.items()})
    return chosen


def name_of(options: dict) -> str:
    return "-".join(str(value).removeprefix("torch.") for value in options.values())


@dataclass(frozen=True)
class Case:
    """A block of logits, and what is asked of it. `shards`: columns at which the vocabulary is cut."""

    dtype: torch.dtype = torch.float32
    gradient: torch.dtype = torch.float32
    vocab: int = 127
    tokens: int = 3
    temperature: float = 1.0
    upstream: str = "both"
    layout: str = "contiguous"
    shards: tuple[int, ...] = ()

    def values(self) -> tuple[Tensor, Tensor]:
        """logits [T, V] and targets [T], some of them on the edges of shards."""
        generator = torch.Generator().manual_seed(5)
        logits = 3 * torch.randn(self.tokens, self.vocab, generator=generator)
        target = torch.randint(self.vocab, (self.tokens,), generator=generator)
        edges = [edge for cut in (0, *self.shards, self.vocab) for edge in (cut - 1, cut) if 0 <= edge < self.vocab]
        for row, edge in zip(range(self.tokens), edges, strict=False):
            target[row] = edge
        return logits.to(self.dtype), target


def laid_out(logits: Tensor, layout: str) -> tuple[Tensor, Tensor]:
    """(memory [rows, columns] full of GUARD but for them, the logits in it); behind the last row there are 4096 more."""
    rows, columns = logits.shape
    top, left, right = {"contiguous": (0, 0, 0), "padded": (0, 0, 21), "sliced": (2, 5, 8)}[layout]
    width = left + columns + right
    memory = torch.full((top + rows + -(-4096 // width), width), GUARD, dtype=logits.dtype)
    inner = memory[top : top + rows, left : left + columns]
    return memory, inner.copy_(logits)


def upstream_of(case: Case) -> tuple[Tensor, Tensor | None]:
    """dlogprob, dentropy [T] of random sign."""
    signs = torch.randn(2, case.tokens, generator=torch.Generator().manual_seed(6))
    return signs[0] * (case.upstream != "entropy"), None if "logprob" in case.upstream else signs[1]


def merged(parts: list[RowStatistics], temperature: float) -> RowStatistics:
    """As `merge_shards` does it, without a process group."""
    stacked = torch.stack([torch.stack([value for value in part if value is not None]) for part in parts])
    with mock.patch.object(merge, "gather_ranks", lambda mine, group: stacked):
        return merge.merge_shards(parts[0], temperature, group=object())


def largest_error(got: Tensor, want: Tensor) -> float:
    return float((got - want).detach().abs().max()) if want.numel() else 0.0


def check(case: Case, values: tuple[Tensor, Tensor] | None = None, kernels: type = TritonSoftmax) -> dict[str, float]:
    """Asserts that statistics and gradient are those of float64; returns the errors."""
    values, target = values or case.values()
    want_entropy = case.upstream != "logprob alone"
    exact = values.double().requires_grad_()
    log_p = torch.log_softmax(exact / case.temperature, 1)
    want_logprob = log_p.gather(1, target[:, None]).squeeze(1)
    want_entropies = -(log_p.exp() * log_p).sum(1)

    memory, logits = laid_out(values, case.layout)
    untouched = torch.ones_like(memory, dtype=torch.bool)
    cuts = (0, *case.shards, case.vocab)
    blocks, parts = [], []
    for start, end in itertools.pairwise(cuts):
        part = logits[:, start:end]
        blocks.append(kernels(part, target - start, case.temperature, want_entropy) if end > start else None)
        none = torch.full((case.tokens,), -torch.inf)
        parts.append(blocks[-1].statistics() if end > start else empty_shard(none, want_entropy))
    row = merged(parts, case.temperature) if case.shards else parts[0]
    assert torch.equal(row.max, values.float().amax(1))
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


SOFTMAX_CASES = pairwise({
    "dtypes": [
        (torch.float32, torch.float32), (torch.float32, torch.bfloat16), (torch.float32, torch.float16),
        (torch.float16, torch.float16), (torch.bfloat16, torch.bfloat16),
    ],
    "vocab": [1, 127, 1000, 1003, 4096], "tokens": [0, 1, 17, 32], "temperature": [1.0, 0.6, 1.7],
    "upstream": ["logprob alone", "logprob", "entropy", "both"], "layout": ["contiguous", "padded", "sliced"],
})  # fmt: skip


@pytest.mark.parametrize("options", SOFTMAX_CASES, ids=name_of)
def test_statistics_and_gradient_are_those_of_float64(options: dict) -> None:
    (dtype, gradient), rest = options["dtypes"], {name: value for name, value in options.items() if name != "dtypes"}
    check(Case(dtype=dtype, gradient=gradient, **rest))


LARGE = Case(gradient=torch.bfloat16, vocab=152064, tokens=2, shards=(1, 70000))
BLOCKS = Case(gradient=torch.bfloat16, vocab=2 * BLOCK + 811, tokens=2, layout="padded")  # rows of three blocks


@pytest.mark.parametrize(
    "case",
    [
        LARGE,
        replace(LARGE, dtype=torch.bfloat16, shards=(), temperature=0.7),
        BLOCKS,
        replace(BLOCKS, gradient=torch.float32, upstream="logprob alone"),
        replace(BLOCKS, gradient=torch.float16, temperature=0.6),
        replace(BLOCKS, dtype=torch.float16, gradient=torch.float16),
    ],
)
def test_rows_of_many_blocks(case: Case) -> None:
    check(case)


@pytest.mark.parametrize("shards", [(50,), (1, 126), (40, 40), (0, 60), (60, 127), (30, 41, 91)])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_shards_with_targets_on_their_edges(shards: tuple[int, ...], temperature: float) -> None:
    check(Case(shards=shards, tokens=8, temperature=temperature, layout="sliced"))


def test_a_target_in_no_shard_is_in_no_column() -> None:
    logits = torch.randn(4, 100)
    for column in (-1, 100, 5000, -(2**40), 2**40):
        block = TritonSoftmax(logits.clone(), torch.full((4,), column), 1.0, True)
        row = block.statistics()
        assert (row.target == -torch.inf).all()
        torch.testing.assert_close(row.rest, (logits - logits.amax(1, keepdim=True)).exp().sum(1))
        # Another shard holds the target, and adds nothing else here.
        row = row._replace(target=torch.zeros(4))
        gradient = block.gradient(row, torch.ones(4), None, torch.float32)
        torch.testing.assert_close(gradient, -(logits - row.max[:, None]).exp() / row.sum()[:, None])


def offset_case(case: Case) -> tuple[Tensor, Tensor]:
    """Logits near 1e4, on a grid that fp32 holds there."""
    logits, target = case.values()
    return (logits * 256).round() / 256 + 1e4, target


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_logits_offset_by_ten_thousand(temperature: float) -> None:
    for case in (Case(temperature=temperature), replace(BLOCKS, gradient=torch.float32, temperature=temperature)):
        check(case, offset_case(case))


def confident_case(case: Case, lead: float) -> tuple[Tensor, Tensor]:
    logits, target = case.values()
    return logits.scatter(1, target[:, None], lead), target


def check_confident(kernels: type = TritonSoftmax) -> None:
    """p of the target from 0.9999 to 1 - 1e-11: its gradient (1 - p) keeps its relative precision. (fp16 has no numbers so small.)"""
    for lead in (20.0, 27.0, 36.0):
        for dtype in (torch.float32, torch.bfloat16):
            case = Case(gradient=dtype, upstream="logprob alone")
            logits, target = confident_case(case, lead)
            if lead < 30:  # further on, autograd's own difference is too coarse
                check(case, (logits, target), kernels)
            rest = logits.double().exp().scatter(1, target[:, None], 0).sum(1, keepdim=True)
            want = rest / (rest + torch.tensor(lead).double().exp())
            assert 0 < want.min() and want.max() < 1e-3
            block = kernels(logits, target, 1.0, False)
            got = (
                block.gradient(block.statistics(), torch.ones(case.tokens), None, dtype)
                .double()
                .gather(1, target[:, None])
            )
            torch.testing.assert_close(got, want, rtol=GRADIENT_TOLERANCE[dtype], atol=0)


def test_a_confident_target_keeps_the_precision_of_its_gradient() -> None:
    check_confident()


@pytest.mark.parametrize("want_entropy", [False, True])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("place", [0, 3, BLOCK + 5])
@pytest.mark.parametrize("is_target", [False, True])
def test_what_is_not_finite_stays_so(want_entropy: bool, bad: float, place: int, is_target: bool) -> None:
    logits = torch.randn(2, BLOCK + 100)
    logits[1, place] = bad
    target = torch.tensor([place, place if is_target else 7])
    block = TritonSoftmax(logits, target, 1.0, want_entropy)
    row = block.statistics()
    values = (row.logprob(), row.entropy()) if want_entropy else (row.logprob(),)
    for value in values:
        assert value[0].isfinite() and not value[1].isfinite()
    gradient = block.gradient(row, torch.ones(2), torch.ones(2) if want_entropy else None, torch.bfloat16)
    assert gradient[0].isfinite().all() and not gradient[1].isfinite().all()


@pytest.mark.parametrize("masked", [slice(0, BLOCK + 2), slice(5, 9), slice(BLOCK - 1, None)])
def test_columns_of_probability_zero(masked: slice) -> None:
    """Logits of -inf: the log-prob is that of the others, the entropy is NaN (0 times -inf) as in the definition."""
    logits = torch.randn(3, BLOCK + 100)
    logits[:2, masked] = -torch.inf
    target = torch.tensor([BLOCK + 9 if masked.start == 0 else 3, masked.start, 4])
    inputs = logits.double().requires_grad_()
    want = torch.log_softmax(inputs, 1).gather(1, target[:, None]).squeeze(1)
    block = TritonSoftmax(logits.clone(), target, 1.0, False)
    row = block.statistics()
    torch.testing.assert_close(row.logprob().double(), want, rtol=0, atol=LOGPROB_TOLERANCE)
    assert want[1] == -torch.inf
    (want_gradient,) = torch.autograd.grad(want[[0, 2]].sum(), inputs)
    got = block.gradient(row, torch.ones(3), None, torch.float32)
    assert relative(got[[0, 2]], want_gradient[[0, 2]]) < 1e-6 and (got[0, masked] == 0).all()
    entropy = TritonSoftmax(logits.clone(), target, 1.0, True).statistics().entropy()
    assert entropy[:2].isnan().all() and entropy[2].isfinite()


def test_a_row_of_minus_infinity_has_no_softmax() -> None:
    for want_entropy in (False, True):
        row = TritonSoftmax(torch.full((1, BLOCK + 5), -torch.inf), torch.tensor([3]), 1.0, want_entropy).statistics()
        assert row.max == -torch.inf and row.rest.isnan() and row.logprob().isnan()


def test_the_lowest_of_numbers_is_a_logit_like_others() -> None:
    lowest = torch.finfo(torch.float32).min
    check(Case(vocab=BLOCK + 7, tokens=1), (torch.full((1, BLOCK + 7), lowest), torch.tensor([4])))
    logits = torch.full((1, BLOCK + 7), lowest)
    logits[0, -1] = -lowest  # farther apart than the largest number
    row = TritonSoftmax(logits, torch.tensor([BLOCK + 6]), 1.0, False).statistics()
    assert row.logprob() == 0


def check_beyond_two_to_the_31(kernels: type = TritonSoftmax) -> None:
    """Three rows of bf16 logits 2^30 elements apart, in memory of which only those pages are ever touched.

    The view begins 2^31 elements behind the memory's start: an offset that wraps would read zeros there, not crash.
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


def test_offsets_beyond_two_to_the_31_elements() -> None:
    check_beyond_two_to_the_31()


def test_softmax_of_chooses_the_kernels() -> None:
    logits, column = torch.randn(2, 9), torch.tensor([1, 2])
    options = {"temperature": 1.0, "want_entropy": True, "sharded": False}

    def no_scratch() -> Tensor:
        raise AssertionError("memory was asked for")

    assert isinstance(softmax_of(logits, column, scratch=no_scratch, **options), TritonSoftmax)
    assert isinstance(
        softmax_of(logits.double(), column, scratch=lambda: torch.empty(2, 9).double(), **options), TorchSoftmax
    )


@pytest.mark.parametrize(
    "change, message",
    [
        ({"logits": torch.zeros(40, 3).t()}, "next to each other"),
    ],
)
def test_what_does_not_fit_is_refused(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        block = TritonSoftmax(
            **({"column": torch.zeros(3, dtype=torch.int64), "temperature": 1.0, "want_entropy": False} | change)
        )
        block.gradient(block.statistics(), torch.ones(3), None, torch.float32)


# ---------------------------------------------------------------------------------------------------------------- through the head


class GpuProducts:
    """Matrix products that take half precision operands of any layout, as a GPU's do, and remember those that came."""

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


@pytest.fixture
def gpu_products(monkeypatch) -> Iterator[GpuProducts]:
    """The head computes as on a GPU: half precision weights stay what they are, and so dlogits are made in place."""
    products = GpuProducts()
    monkeypatch.setattr(head, "operand", lambda tensor: tensor)
    monkeypatch.setattr(head, "product", products.product)
    monkeypatch.setattr(head, "add_product", products.add_product)
    yield products


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
    """Both operations and their gradients against the definition in float64, dW in fp32 (`grad_weight_out`) too."""
    hidden, weight, target = head_inputs(options)
    tokens, chunk = target.shape[0], {"one": 1, "odd": 7, "all": None}[options["chunk"]]
    temperature, tolerance = options["temperature"], GRADIENT_TOLERANCE[options["dtype"]]
    signs = torch.randn(2, tokens, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    signs[0] *= options["upstream"] != "entropy"
    signs[1] *= options["upstream"] != "logprob"
    exact = double(hidden, weight)
    want = reference.linear_logprob_entropy(*exact, target, temperature=temperature)
    want_gradients = torch.autograd.grad((signs[0] * want[0]).sum() + (signs[1] * want[1]).sum(), exact)

    got = linear_logprob_entropy(hidden, weight, target, temperature=temperature, chunk_tokens=chunk)
    weights = signs.float()
    got_gradients = torch.autograd.grad((weights[0] * got[0]).sum() + (weights[1] * got[1]).sum(), (hidden, weight))
    main_grad = torch.zeros(weight.shape)
    loss, _ = linear_token_loss(
        hidden, weight, target, lambda logprob, entropy, streams: (streams["a"] * logprob + streams["b"] * entropy, {}),
        streams={"a": weights[0], "b": weights[1]}, denom=1, temperature=temperature, chunk_tokens=chunk, grad_weight_out=main_grad,
    )  # fmt: skip
    loss.backward()
    errors = {
        "logprob": largest_error(got[0], want[0]),
        "entropy": largest_error(got[1], want[1]),
        "loss": largest_error(loss, (signs[0] * want[0] + signs[1] * want[1]).sum()) / max(1, tokens),
    }
    assert all(error < LOGPROB_TOLERANCE for error in errors.values()), errors
    # A gradient returned in half precision is rounded once more.
    for name, value, wanted, bound in (
        ("dX", got_gradients[0], want_gradients[0], 2 * tolerance), ("dW", got_gradients[1], want_gradients[1], 2 * tolerance),
        ("dX of the loss", hidden.grad, want_gradients[0], 2 * tolerance), ("dW in main_grad", main_grad, want_gradients[1], tolerance),
    ):  # fmt: skip
        if wanted.norm() > 1e-12:
            errors[name] = relative(value, wanted)
            assert errors[name] < bound, f"{name}: {errors}"
        else:  # one column, or nothing labelled
            assert value.abs().sum() < 1e-4 * tolerance
    return errors


HEAD_CASES = pairwise({
    "dtype": [torch.float32, torch.float16, torch.bfloat16], "vocab": [1, 127, 1000, 1003], "tokens": [0, 1, 17],
    "temperature": [1.0, 0.7, 1.7], "ignored": ["none", "some", "all"], "upstream": ["logprob", "entropy", "both"],
    "layout": ["contiguous", "padded", "sliced"], "chunk": ["one", "odd", "all"],
})  # fmt: skip


@pytest.mark.parametrize("options", HEAD_CASES, ids=name_of)
def test_both_operations_agree_with_the_definition(options: dict, gpu_products) -> None:
    check_head(options)


EXAMPLE = {
    "dtype": torch.bfloat16, "vocab": 127, "tokens": 17, "temperature": 1.0, "ignored": "some", "upstream": "both",
    "layout": "contiguous", "chunk": "odd",
}  # fmt: skip


def test_half_precision_gradients_lie_in_the_memory_of_the_logits(gpu_products) -> None:
    check_head(EXAMPLE)
    assert gpu_products.dlogits
    # Rows of 127 fp32 logits begin 128 apart; so their bf16 gradients do 256 apart.
    assert all(dlogits.stride() == (256, 1) and dlogits.shape[1] == 127 for dlogits in gpu_products.dlogits)


def test_backward_reads_the_logits_once(gpu_products, monkeypatch) -> None:
    hidden, weight, target = head_inputs(EXAMPLE)
    logprob, entropy = linear_logprob_entropy(hidden, weight, target)
    monkeypatch.setattr(TritonSoftmax, "statistics", lambda self: pytest.fail("the statistics are known in backward"))
    (logprob + entropy).sum().backward()
    assert weight.grad.isfinite().all()


def test_accumulation_over_micro_batches_is_one_batch(gpu_products) -> None:
    hidden, weight, target = make_inputs(16, 300)
    hidden, weight = (tensor.detach().bfloat16().requires_grad_() for tensor in (hidden, weight))
    streams, token_weight = make_streams(hidden, weight, target)

    def run(rows: slice, main_grad: Tensor) -> None:
        pieces = {name: stream[rows] for name, stream in streams.items()}
        linear_token_loss(
            hidden[rows], weight, target[rows], clipped_policy, streams=pieces, denom=9, token_weight=token_weight[rows],
            grad_weight_out=main_grad,
        )  # fmt: skip

    whole, halves = torch.zeros(2, *weight.shape).unbind()
    run(slice(None), whole)
    run(slice(0, 8), halves)
    run(slice(8, None), halves)
    assert relative(halves, whole.double()) < 1e-6  # the order of an fp32 sum


# -------------------------------------------------------------------------------------------- what these tests would not let pass


@pytest.fixture
def mutated(tmp_path, monkeypatch) -> Callable[..., ModuleType]:
    """A copy of a module with a piece of its text replaced: in the `which`-th of its `times` places."""

    def make(original: ModuleType, old: str, new: str, *, which: int = 0, times: int = 1) -> ModuleType:
        pieces = Path(original.__file__).read_text().split(old)
        assert len(pieces) == times + 1, f"{old!r} is there {len(pieces) - 1} times"
        path = tmp_path / f"mutated_{which}.py"
        path.write_text(old.join(pieces[: which + 1]) + new + old.join(pieces[which + 1 :]))
        spec = importlib.util.spec_from_file_location(path.stem, path)
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, path.stem, module)  # dataclasses look for their module there
        spec.loader.exec_module(module)
        return module

    return make


@pytest.fixture
def mutated_kernels(mutated) -> Callable[..., type]:
    return lambda old, new, **place: mutated(triton_softmax, old, new, **place).TritonSoftmax


PADDED = Case(vocab=1003, tokens=2, layout="padded")


def test_mutation_nothing(mutated_kernels) -> None:
    check(PADDED, kernels=mutated_kernels("exp(y)", "exp(y)", times=2))


@pytest.mark.parametrize("kernel", [0, 1])
def test_mutation_no_padding_mask(mutated_kernels, kernel: int) -> None:
    kernels = mutated_kernels("inside = index < columns", "inside = index >= 0", which=kernel, times=2)
    with pytest.raises(AssertionError):
        check(PADDED, kernels=kernels)


def test_mutation_p_rounded_before_the_one_hot_is_subtracted(mutated_kernels, monkeypatch) -> None:
    kernels = mutated_kernels("exp(y) * factor", "exp(y).to(tl.bfloat16).to(tl.float32) * factor")
    with pytest.raises(AssertionError, match="gradient"):
        check(PADDED, kernels=kernels)

    def of_rounded_p(row: RowStatistics, dlogprob: Tensor, dentropy: Tensor | None, temperature: float) -> Tensor:
        return dlogprob * (1 - row.logprob().exp().bfloat16().float()) / temperature

    for module in (softmax, triton_softmax):
        monkeypatch.setattr(module, "target_gradient", of_rounded_p)
    with pytest.raises(AssertionError):
        check_confident()


def test_mutation_dw_accumulated_in_bf16(gpu_products, monkeypatch) -> None:
    def rounded(accumulator: Tensor, a: Tensor, b: Tensor) -> None:
        accumulator.copy_((accumulator.bfloat16() + (a.float() @ b.float()).bfloat16()).float())

    options = EXAMPLE | {"dtype": torch.float32}
    check_head(options)
    monkeypatch.setattr(head, "add_product", rounded)
    with pytest.raises(AssertionError, match="dW"):
        check_head(options)


def test_mutation_no_padding_mask_in_the_head(mutated, monkeypatch) -> None:
    check_padding_columns_take_no_part()
    monkeypatch.setattr(linear_logprob, "Head", mutated(head, "operand(weight[: max(0, end)])", "operand(weight)").Head)
    with pytest.raises(AssertionError):
        check_padding_columns_take_no_part()


def test_mutation_blocks_downwards(mutated_kernels) -> None:
    """In place, a block's gradient would overwrite logits that are still to be read."""
    down = "index = (columns - 1) // block * block - start + tl.arange(0, block)"
    with pytest.raises(AssertionError, match="gradient"):
        check(BLOCKS, kernels=mutated_kernels("index = start + tl.arange(0, block)", down, which=1, times=2))


@pytest.mark.parametrize("kernel", [0, 1])
def test_mutation_offsets_of_32_bits(mutated_kernels, kernel: int) -> None:
    with pytest.raises(AssertionError):
        check_beyond_two_to_the_31(
            mutated_kernels("tl.cast(tl.program_id(0), tl.int64)", "tl.program_id(0)", which=kernel, times=2)
        )
