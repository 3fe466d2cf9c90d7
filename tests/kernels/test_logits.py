"""Log-prob, entropy and cross entropy of given logits against float64: on one process, then on vocabulary shards."""

from __future__ import annotations

from dataclasses import dataclass
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from pctrain_kernels import logits as logits_module
from pctrain_kernels import reference, vocab_parallel_cross_entropy, vocab_parallel_logprob_entropy
from tests.helpers.kernel_inputs import LOGPROB_TOLERANCE, Tensors, relative

# Relative to the gradient's norm: rounding of exponentials of arguments near 10; half precision adds one rounding, half
# a unit.
GRADIENT_TOLERANCE = {torch.float32: 1e-6, torch.float16: 2**-11, torch.bfloat16: 2**-8}
SHAPES = [(0, 5), (1, 1), (17, 1), (1, 127), (17, 127), (32, 1003)]
LAYOUTS = ["contiguous", "padded rows", "sliced", "transposed"]


def make_logits(
    tokens: int,
    vocab: int,
    *,
    seed: int = 0,
    ignored: float = 0.3,
    dtype=torch.float32,
    layout="contiguous",
    valid=None,
):
    """Return logits [T, V], a leaf in memory of that layout, and target [T] less than `valid` with a share of -100."""
    generator = torch.Generator().manual_seed(seed)
    values = (3 * torch.randn(tokens, vocab, generator=generator)).to(dtype)
    memory = torch.full((tokens + 3, vocab + 7), 5.0, dtype=dtype)
    view = {
        "contiguous": lambda: torch.empty(tokens, vocab, dtype=dtype),
        "padded rows": lambda: memory[:tokens, :vocab],
        "sliced": lambda: memory[2 : 2 + tokens, 3 : 3 + vocab],
        "transposed": lambda: torch.empty(vocab, tokens, dtype=dtype).t(),
    }[layout]()
    target = torch.randint(valid or vocab, (tokens,), generator=generator)
    target[torch.rand(tokens, generator=generator) < ignored] = -100
    return view.copy_(values).requires_grad_(), target


def random_signs(tokens: int, upstream: str) -> Tensor:
    """Return random derivatives [2, T] of log-prob and entropy."""
    signs = torch.randn(2, tokens, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    signs[0] *= upstream != "entropy"
    signs[1] *= upstream != "logprob"
    return signs


def compare(
    logits: Tensor, target: Tensor, *, upstream: str = "both", inplace: bool = False, tolerance: float = 1.0, **options
) -> None:
    """Return value and gradient of op 1 and of its float64 definition; check that forward keeps the logits."""
    signs = random_signs(len(target), upstream)
    leaf = logits.detach().double().requires_grad_()
    want = reference.vocab_parallel_logprob_entropy(leaf, target, **options)
    (want_gradient,) = torch.autograd.grad(
        sum((sign * value).sum() for sign, value in zip(signs, want, strict=True)), leaf
    )
    before = logits.detach().clone()
    got = vocab_parallel_logprob_entropy(logits, target, inplace_backward=inplace, **options)
    assert torch.equal(logits, before)
    for got_value, want_value in zip(got, want, strict=True):
        assert got_value.dtype == torch.float32
        torch.testing.assert_close(got_value.double(), want_value.detach(), rtol=0, atol=LOGPROB_TOLERANCE * tolerance)
        assert (got_value[target == -100] == 0).all()
    terms = [(sign.float() * value).sum() for sign, value in zip(signs, got, strict=True) if sign.any()]
    if not terms:
        return
    (got_gradient,) = torch.autograd.grad(sum(terms), logits)
    assert got_gradient.dtype == logits.dtype and not got_gradient[target == -100].any()
    assert relative(got_gradient, want_gradient) < GRADIENT_TOLERANCE[logits.dtype] * tolerance
    assert (got_gradient.data_ptr() == logits.data_ptr()) == (inplace and logits.numel() > 0)
    assert inplace or torch.equal(logits, before)


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("upstream", ["logprob", "entropy", "both"])
@pytest.mark.parametrize("shape", SHAPES)
def test_values_and_gradient_are_those_of_the_definition(shape, upstream, inplace) -> None:
    compare(*make_logits(*shape), upstream=upstream, inplace=inplace)


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("dtype", GRADIENT_TOLERANCE)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("ignored", [0.0, 0.4])
def test_any_layout_and_dtype(layout, dtype, ignored, inplace) -> None:
    logits, target = make_logits(17, 127, dtype=dtype, layout=layout, ignored=ignored, valid=120)
    compare(logits, target, inplace=inplace, temperature=0.7, valid_vocab=120)


@settings(max_examples=40)
@given(
    tokens=st.integers(1, 40),
    vocab=st.integers(1, 300),
    padding=st.integers(0, 70),
    seed=st.integers(0, 1000),
    temperature=st.floats(0.3, 3),
    ignored=st.sampled_from([0.0, 0.5, 1.1]),
    inplace=st.booleans(),
    block=st.integers(1, 20),
    upstream=st.sampled_from(["logprob", "entropy", "both"]),
    layout=st.sampled_from(LAYOUTS),
)
def test_any_shape_agrees_with_the_definition(
    tokens, vocab, padding, seed, temperature, ignored, inplace, block, upstream, layout
) -> None:
    logits, target = make_logits(tokens, vocab + padding, seed=seed, ignored=ignored, valid=vocab, layout=layout)
    # Rows are in blocks of `block`. A temperature of 0.3 makes logits and their rounding errors three times as large. A
    # gradient that is exactly 0 (one valid column) has a norm of 0, by which `relative` would divide.
    with mock.patch.object(logits_module, "CPU_BLOCK_BYTES", 4 * vocab * block):
        compare(
            logits,
            target,
            upstream=upstream,
            inplace=inplace,
            tolerance=3 * max(1, 1 / temperature),
            temperature=temperature,
            valid_vocab=vocab,
        )


def test_float64_and_gradcheck() -> None:
    logits, target = make_logits(7, 20, dtype=torch.float64)
    assert torch.autograd.gradcheck(
        lambda x: vocab_parallel_logprob_entropy(x, target, temperature=0.7, valid_vocab=19), logits
    )
    options = {"temperature": 0.7, "label_smoothing": 0.2, "z_loss": 0.03, "valid_vocab": 19}
    assert torch.autograd.gradcheck(lambda x: vocab_parallel_cross_entropy(x, target, **options), logits)


def test_logits_offset_by_ten_thousand() -> None:
    logits, target = make_logits(17, 101)
    with torch.no_grad():
        logits.copy_((logits * 64).round() / 64 + 1e4)  # exact in fp32
    compare(logits, target)


def test_confident_target_keeps_the_relative_precision_of_its_gradient() -> None:
    logits, target = make_logits(8, 40, ignored=0)
    with torch.no_grad():
        logits[range(8), target] += 24
    leaf = logits.detach().double().requires_grad_()
    want = reference.vocab_parallel_logprob_entropy(leaf, target)[0]
    assert want.exp().min() > 0.9999 and want.max() < 0
    (want_gradient,) = torch.autograd.grad(want.sum(), leaf)
    got = vocab_parallel_logprob_entropy(logits, target)[0]
    torch.testing.assert_close(got.double(), want, rtol=1e-6, atol=0)
    (got_gradient,) = torch.autograd.grad(got.sum(), logits)
    # Each row by itself: logits of 25 carry an error of 2e-6 into every exponential.
    for got_row, want_row in zip(got_gradient, want_gradient, strict=True):
        assert relative(got_row, want_row) < 5e-6


@pytest.mark.parametrize("tokens", [0, 1, 17])
@pytest.mark.parametrize("inplace", [False, True])
def test_nothing_labelled_gives_exact_zeros_whatever_the_logits_hold(tokens: int, inplace: bool) -> None:
    logits, target = make_logits(tokens, 30, ignored=1.1)
    with torch.no_grad():
        logits[:1] = torch.nan
    logprob, entropy = vocab_parallel_logprob_entropy(logits, target, inplace_backward=inplace)
    loss = vocab_parallel_cross_entropy(logits, target, label_smoothing=0.1, z_loss=0.1)
    for value in (logprob, entropy, loss):
        assert value.shape == (tokens,) and not value.any()
    assert not torch.autograd.grad(loss.sum(), logits)[0].any()
    assert not torch.autograd.grad(logprob.sum() + entropy.sum(), logits)[0].any()


def test_without_entropy_and_without_gradient_the_logprob_is_the_same() -> None:
    logits, target = make_logits(17, 101)
    want, _ = vocab_parallel_logprob_entropy(logits, target)
    logprob, entropy = vocab_parallel_logprob_entropy(logits, target, want_entropy=False)
    assert entropy is None and torch.equal(logprob, want)
    with torch.no_grad():
        logprob, entropy = vocab_parallel_logprob_entropy(logits, target, inplace_backward=True)
    assert torch.equal(logprob, want) and logprob.grad_fn is None and entropy.grad_fn is None


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("at_target", [False, True])
def test_non_finite_input_is_not_hidden(bad: float, at_target: bool) -> None:
    logits, target = make_logits(8, 50, ignored=0)
    with torch.no_grad():
        logits[3, target[3] if at_target else (target[3] + 1) % 50] = bad
    logprob, entropy = vocab_parallel_logprob_entropy(logits, target)
    loss = vocab_parallel_cross_entropy(logits, target, label_smoothing=0.1, z_loss=0.1)
    for value in (logprob, entropy, loss):
        assert not value[3].isfinite() and value[:3].isfinite().all() and value[4:].isfinite().all()
        gradient = torch.autograd.grad(value.sum(), logits, retain_graph=True)[0]
        assert not gradient[3].isfinite().any() and gradient[:3].isfinite().all() and gradient[4:].isfinite().all()


def test_an_in_place_gradient_cannot_be_taken_twice() -> None:
    logits, target = make_logits(8, 50, ignored=0)
    logprob, _ = vocab_parallel_logprob_entropy(logits, target, inplace_backward=True)
    logprob.sum().backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        logprob.sum().backward()


def test_an_in_place_gradient_reaches_what_made_the_logits() -> None:
    hidden, weight = torch.randn(9, 5, requires_grad=True), torch.randn(40, 5, requires_grad=True)
    target = make_logits(9, 40)[1]
    gradients = []
    for inplace in (False, True):
        logprob, entropy = vocab_parallel_logprob_entropy(hidden @ weight.T, target, inplace_backward=inplace)
        gradients.append(torch.autograd.grad((logprob - entropy).sum(), (hidden, weight)))
    assert all(torch.equal(*pair) for pair in zip(*gradients, strict=True))


def test_extra_memory_of_the_gradient_is_blocks_of_rows() -> None:
    logits, target = make_logits(700, 4000, ignored=0)
    with Tensors() as seen:
        logprob, entropy = vocab_parallel_logprob_entropy(logits, target, inplace_backward=True)
        (logprob + entropy).sum().backward()
    made = {shape for shape in seen.sizes if shape != logits.numel()}  # views of the logits are no new memory
    assert 4000 < max(made) <= logits_module.CPU_BLOCK_BYTES // 4 < logits.numel()


SMOOTHED = [(0.0, 0.0), (0.1, 0.0), (0.0, 1e-3), (0.3, 0.02), (1.0, 0.0)]


@pytest.mark.parametrize("label_smoothing, z_loss", SMOOTHED)
@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cross_entropy_is_that_of_torch(label_smoothing, z_loss, temperature, inplace, dtype) -> None:
    logits, target = make_logits(33, 110, valid=101, dtype=dtype)
    leaf = logits.detach().double().requires_grad_()
    y = leaf[:, :101] / temperature
    want = F.cross_entropy(y, target, reduction="none", label_smoothing=label_smoothing)
    want = want + z_loss * y.logsumexp(-1).square() * (target != -100)
    options = {"valid_vocab": 101, "temperature": temperature, "label_smoothing": label_smoothing, "z_loss": z_loss}
    torch.testing.assert_close(
        reference.vocab_parallel_cross_entropy(leaf, target, **options), want, rtol=1e-13, atol=1e-13
    )
    got = vocab_parallel_cross_entropy(logits, target, inplace_backward=inplace, **options)
    assert got.dtype == torch.float32 and not got[target == -100].any()
    torch.testing.assert_close(got.double(), want, rtol=1e-6, atol=LOGPROB_TOLERANCE)
    signs = random_signs(33, "logprob")[0]
    (want_gradient,) = torch.autograd.grad((signs * want).sum(), leaf)
    (gradient,) = torch.autograd.grad((signs.float() * got).sum(), logits)
    assert relative(gradient, want_gradient) < GRADIENT_TOLERANCE[dtype]
    assert not gradient[target == -100].any() and not gradient[:, 101:].any()


def test_smoothing_of_logits_offset_by_ten_thousand() -> None:
    logits, target = make_logits(17, 101)
    with torch.no_grad():
        logits.copy_((logits * 64).round() / 64 + 1e4)
    want = F.cross_entropy(logits.double(), target, reduction="none", label_smoothing=0.2)
    got = vocab_parallel_cross_entropy(logits, target, label_smoothing=0.2)
    torch.testing.assert_close(got.double(), want, rtol=0, atol=LOGPROB_TOLERANCE)


def test_agrees_with_the_loss_of_transformers() -> None:
    from transformers.loss.loss_utils import ForCausalLMLoss

    logits, target = make_logits(33, 101)
    want = ForCausalLMLoss(logits[None], None, 101, shift_labels=target[None], num_items_in_batch=20)
    torch.testing.assert_close(vocab_parallel_cross_entropy(logits, target).sum() / 20, want, rtol=1e-6, atol=0)


def test_vocab_start_moves_the_targets() -> None:
    logits, target = make_logits(17, 50, ignored=0)
    got, _ = vocab_parallel_logprob_entropy(logits, target + 1000, vocab_start=1000, valid_vocab=1050)
    assert torch.equal(got, vocab_parallel_logprob_entropy(logits, target)[0])


@pytest.mark.parametrize(
    "change, message",
    [
        ({"logits": torch.zeros(8)}, "logits"),
        ({"logits": torch.zeros(8, 50, dtype=torch.int64)}, "floating point"),
        ({"target": torch.zeros(7, dtype=torch.int64)}, r"target int64 \[8\]"),
        ({"target": torch.zeros(8, dtype=torch.int32)}, "int32"),
        ({"temperature": 0.0}, "temperature"),
        ({"valid_vocab": 0}, "valid_vocab"),
        ({"logits": torch.zeros(1, 50).expand(8, 50), "inplace_backward": True}, "inplace_backward"),
        ({"label_smoothing": 1.1}, "label_smoothing"),
        ({"z_loss": -0.1}, "z_loss"),
        ({"z_loss": torch.nan}, "z_loss"),
    ],
)
def test_mismatched_arguments_are_refused(change: dict, message: str) -> None:
    logits, target = make_logits(8, 50)
    with pytest.raises(ValueError, match=message):
        vocab_parallel_cross_entropy(**({"logits": logits, "target": target} | change))


@pytest.mark.parametrize("bad", [50, -1])
def test_a_target_outside_the_vocabulary_is_refused(bad: int) -> None:
    logits, target = make_logits(8, 60, valid=50)
    target[2] = bad
    with pytest.raises(RuntimeError, match=r"\[0, 50\)"):
        vocab_parallel_logprob_entropy(logits, target, valid_vocab=50)


@dataclass(frozen=True)
class Case:
    shards: tuple[int, ...]  # columns of each rank
    tokens: int = 20
    valid: int | None = None
    ignored: float = 0.3
    offset: float = 0.0  # added to the logits of a shard, times its index
    edges: bool = False  # targets on the first and last column of every shard
    temperature: float = 1.0
    dtype: torch.dtype = torch.float32
    inplace: bool = False

    def inputs(self) -> tuple[Tensor, Tensor]:
        logits, target = make_logits(
            self.tokens, sum(self.shards), ignored=self.ignored, valid=self.valid, dtype=self.dtype
        )
        ends = torch.tensor(self.shards).cumsum(0).tolist()
        with torch.no_grad():
            for rank, end in enumerate(ends):
                logits[:, end - self.shards[rank] : end] += self.offset * rank
        if self.edges:
            edges = sorted(
                {column for end, size in zip(ends, self.shards, strict=True) for column in (end - size, end - 1)}
            )
            target[: len(edges)] = torch.tensor(edges)
        return logits.detach(), target

    @property
    def start(self) -> list[int]:
        return [sum(self.shards[:rank]) for rank in range(len(self.shards))]


CASES = {
    "even": Case((50, 50)),
    "uneven, targets on edges": Case((40, 61), temperature=0.7, edges=True, inplace=True),
    "nothing ignored": Case((40, 61), ignored=0, inplace=True),
    "bf16": Case((40, 61), dtype=torch.bfloat16),
    "padding in the last shard": Case((60, 60), valid=97),
    "a shard of padding alone": Case((90, 30), valid=80, inplace=True),
    "a shard without columns": Case((90, 0)),
    "one shard far above": Case((50, 50), offset=200.0),
    "no tokens": Case((50, 50), tokens=0),
    "all ignored": Case((40, 61), ignored=1.1),
    "four uneven, targets on edges": Case((30, 11, 50, 10), temperature=1.7, offset=3.0, edges=True),
    "four, two of padding": Case((30, 30, 30, 30), valid=55, tokens=32, inplace=True),
    "four of one column": Case((1, 1, 1, 1), tokens=17),
}
SMOOTHING = {"label_smoothing": 0.2, "z_loss": 0.01}
COLLECTIVES = [
    name
    for name in (
        "all_gather_into_tensor",
        "all_gather_single",
        "all_gather",
        "all_reduce",
        "broadcast",
        "reduce",
        "reduce_scatter",
        "reduce_scatter_tensor",
        "all_to_all_single",
    )
    if hasattr(dist, name)
]


def run_cases(cases: dict[str, Case]) -> dict[str, dict]:
    rank = dist.get_rank()
    pairs = [dist.new_group(pair) for pair in ([0, 1], [2, 3])]
    groups = {2: pairs[rank // 2], 4: dist.group.WORLD}
    results = {name: run_case(case, groups[len(case.shards)]) for name, case in cases.items()}
    dist.destroy_process_group(pairs[rank // 2])
    return results


def run_case(case: Case, group: dist.ProcessGroup) -> dict:
    """Return this rank's results of both operations, and the shapes of its collectives by direction."""
    rank = dist.get_rank(group)
    whole, target = case.inputs()
    shard = whole[:, case.start[rank] : case.start[rank] + case.shards[rank]]
    leaves = [shard.clone().requires_grad_() for _ in range(2)]
    options = {
        "vocab_start": case.start[rank],
        "valid_vocab": case.valid,
        "group": group,
        "temperature": case.temperature,
    }
    options["inplace_backward"] = case.inplace
    signs = random_signs(case.tokens, "both").float()
    sent: list[tuple] = []
    with counted_collectives(sent):
        values = [*vocab_parallel_logprob_entropy(leaves[0], target, **options)]
        values += [vocab_parallel_cross_entropy(leaves[1], target, **options, **SMOOTHING)]
        with torch.no_grad():
            plain = vocab_parallel_cross_entropy(leaves[1], target, **options)
        forward = list(sent)
        gradients = [torch.autograd.grad((signs * torch.stack(values[:2])).sum(), leaves[0])[0]]
        gradients += [torch.autograd.grad((signs[0] * values[2]).sum(), leaves[1])[0]]
    return {
        "values": [value.detach() for value in (*values, plain)],
        "gradients": gradients,
        "forward": forward,
        "backward": sent[len(forward) :],
    }


class counted_collectives:
    """Record the shape of the tensor that each collective of torch.distributed sends."""

    def __init__(self, sent: list[tuple]) -> None:
        self.sent = sent

    def __enter__(self) -> None:
        from pctrain_kernels import parallel

        self.patches = []
        for module, name in [(dist, name) for name in COLLECTIVES] + [(parallel, "_all_gather")]:
            real = getattr(module, name)

            def counted(*args, real=real, name=name, **kwargs):
                self.sent.append((name, *args[min(1, len(args) - 1)].shape))
                return real(*args, **kwargs)

            self.patches.append(mock.patch.object(module, name, counted))
            self.patches[-1].start()

    def __exit__(self, *_) -> None:
        for patch in self.patches:
            patch.stop()


@pytest.fixture(scope="module")
def results(ranks) -> dict[str, list[dict]]:
    by_rank = ranks.run(run_cases, CASES, world=4)
    return {name: [of_rank[name] for of_rank in by_rank] for name in CASES}


@pytest.mark.parametrize("name", CASES)
def test_shards_agree_with_one_process_and_ranks_bit_for_bit(results, name: str) -> None:
    case, by_rank = CASES[name], results[name]
    whole, target = case.inputs()
    leaf = whole.double().requires_grad_()
    options = {"valid_vocab": case.valid, "temperature": case.temperature}
    want = [*reference.vocab_parallel_logprob_entropy(leaf, target, **options)]
    want += [reference.vocab_parallel_cross_entropy(leaf, target, **options, **SMOOTHING)]
    signs = random_signs(case.tokens, "both")
    want_gradients = [torch.autograd.grad((signs * torch.stack(want[:2])).sum(), leaf)[0]]
    want_gradients += [torch.autograd.grad((signs[0] * want[2]).sum(), leaf)[0]]
    want += [reference.vocab_parallel_cross_entropy(leaf, target, **options)]
    # Logits near 600 give the fp32 sum of smoothing an error of a few units of 3e-5.
    size = max(1, case.offset / 50)
    for got in by_rank:
        assert all(torch.equal(*pair) for pair in zip(got["values"], by_rank[0]["values"], strict=True))
    for got_value, want_value in zip(by_rank[0]["values"], want, strict=True):
        torch.testing.assert_close(got_value.double(), want_value.detach(), rtol=1e-6, atol=LOGPROB_TOLERANCE * size)
        assert not got_value[target == -100].any()
    for op, want_gradient in enumerate(want_gradients):
        got_gradient = torch.cat([by_rank[rank]["gradients"][op] for rank in range(len(case.shards))], 1)
        assert got_gradient.dtype == case.dtype and not got_gradient[target == -100].any()
        assert relative(got_gradient, want_gradient) < 3 * GRADIENT_TOLERANCE[case.dtype]


@pytest.mark.parametrize("name", CASES)
def test_one_collective_a_forward_and_none_a_backward(results, name: str) -> None:
    labelled = int((CASES[name].inputs()[1] != -100).sum())
    # Op 1, cross entropy with smoothing, cross entropy.
    assert results[name][0]["forward"] == [("_all_gather", rows, labelled) for rows in (4, 5, 3)]
    assert results[name][0]["backward"] == []
