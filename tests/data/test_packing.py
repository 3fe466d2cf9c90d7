"""Packs: every prediction once, with its weight and streams, whatever the data parallel size."""

import sys
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pctrain.common.errors import UserError
from pctrain.data.packing import NO_LABEL, PackedBatch, PackShape, deal, first_fit_decreasing, pack_rows, plan
from pctrain.data.rows import Row, RowSet, make_row

BUDGET = 32


@st.composite
def row_lists(draw):
    lengths = draw(st.lists(st.integers(1, BUDGET), min_size=1, max_size=20))
    rng = np.random.default_rng(draw(st.integers(0, 10**6)))
    rows = []
    for length in lengths:
        weights = rng.random(length).astype(np.float32) * (rng.random(length) < 0.7)
        weights[0] = 0
        streams = {name: rng.random(length).astype(np.float32) for name in ("advantage", "old_logprob")}
        rows.append(Row(rng.integers(0, 100, length), weights.astype(np.float32), streams))
    return rows


def pack_on_all_ranks(rows, dp_size, align=1, multiple=8, equal=False) -> list[PackedBatch]:
    shape = PackShape(align=align, multiple=multiple, equal=equal)
    return [pack_rows(rows, BUDGET, dp_rank=rank, dp_size=dp_size, shape=shape) for rank in range(dp_size)]


@given(row_lists(), st.integers(1, 5), st.sampled_from([1, 4, 8]), st.booleans())
def test_every_prediction_appears_once_over_all_ranks_with_its_weight_and_streams(rows, dp_size, align, equal):
    found = Counter()
    batches = pack_on_all_ranks(rows, dp_size, align, 8, equal)
    assert {batch.positions for batch in batches} == {
        sum(len(pack.tokens) for batch in batches for pack in batch.packs)
    }
    for batch in batches:
        for pack in batch.packs:
            bounds = pack.cu_seqlens.tolist()
            assert len(bounds) == len(pack.rows) + 1
            for index, start, end in zip(pack.rows, bounds[:-1], bounds[1:], strict=True):
                row = rows[index]
                found[index] += 1
                stop = start + len(row)
                assert (
                    not pack.padding[start:stop].any()
                    and pack.padding[stop:end].all()
                    and pack.padding[bounds[-1] :].all()
                )
                assert end - start == -(-len(row) // align) * align
                assert (
                    not pack.tokens[stop:end].any()
                    and not pack.weights[stop:end].any()
                    and (pack.labels[stop:end] == NO_LABEL).all()
                )
                assert pack.tokens[start:stop].tolist() == row.tokens.tolist()
                assert pack.position_ids[start:stop].tolist() == list(range(len(row)))
                # What position i predicts is token i + 1; the last position predicts nothing.
                assert pack.labels[start:stop].tolist() == [*row.tokens[1:].tolist(), NO_LABEL]
                assert pack.weights[start:stop].tolist() == [*row.weights[1:].tolist(), 0]
                for name, values in row.streams.items():
                    assert pack.streams[name][start:stop].tolist() == [*values[1:].tolist(), 0]
    assert found == Counter(range(len(rows)))


@given(row_lists(), st.integers(1, 5), st.sampled_from([1, 4, 16]), st.booleans())
def test_shapes_dtypes_and_padding(rows, dp_size, multiple, equal):
    batches = pack_on_all_ranks(rows, dp_size, 1, multiple, equal)
    assert len({len(batch.packs) for batch in batches}) == 1
    packs = [pack for batch in batches for pack in batch.packs]
    assert len({len(pack.tokens) for pack in packs}) == 1 or not equal
    for pack in packs:
        size, filled = len(pack.tokens), int(pack.cu_seqlens[-1])
        assert size <= BUDGET and size % multiple == 0
        assert equal or size - filled < multiple or not pack.rows  # no more padding than the rounding
        dtypes = {"tokens": torch.int64, "labels": torch.int64, "weights": torch.float32, "position_ids": torch.int64}
        for name, dtype in dtypes.items():
            assert getattr(pack, name).dtype == dtype and getattr(pack, name).shape == (size,)
        assert pack.cu_seqlens.dtype == torch.int32 and pack.cu_seqlens[0] == 0
        assert set(pack.streams) == {"advantage", "old_logprob"}
        assert all(s.dtype == torch.float32 and s.shape == (size,) for s in pack.streams.values())
        real = int(pack.cu_seqlens[-1])
        assert not pack.tokens[real:].any() and not pack.weights[real:].any() and (pack.labels[real:] == NO_LABEL).all()
        assert all(not s[real:].any() for s in pack.streams.values())


@given(row_lists(), st.integers(1, 5))
def test_totals_do_not_depend_on_the_data_parallel_size(rows, dp_size):
    one, many = pack_on_all_ranks(rows, 1)[0], pack_on_all_ranks(rows, dp_size)
    expected = sum(float(w) for row in rows for w in row.weights)
    for batch in many:
        assert batch.loss_tokens == one.loss_tokens  # exactly
        assert batch.loss_tokens == pytest.approx(expected, rel=1e-12)  # float64 sums in another order
        assert (batch.tokens, batch.sequences) == (sum(map(len, rows)), len(rows))
    in_packs = sum(float(pack.weights.double().sum()) for batch in many for pack in batch.packs)
    assert in_packs == pytest.approx(expected, rel=1e-12)


@given(row_lists(), st.integers(1, 5))
def test_rows_that_are_read_when_asked_for_give_the_same_packs(rows, dp_size):
    """And a rank reads its own rows alone."""
    read = []
    known = RowSet.of(rows)
    lazy = RowSet(known.lengths, known.loss_tokens, lambda i: read.append(i) or rows[i], known.streams)
    for rank in range(dp_size):
        one, other = (pack_rows(r, BUDGET, dp_rank=rank, dp_size=dp_size) for r in (rows, lazy))
        assert [pack.rows for pack in one.packs] == [
            pack.rows for pack in other.packs
        ] and one.loss_tokens == other.loss_tokens
        assert all(torch.equal(a.tokens, b.tokens) for a, b in zip(one.packs, other.packs, strict=True))
    assert sorted(read) == list(range(len(rows)))


@given(row_lists(), st.integers(1, 5))
def test_there_are_no_more_packs_than_first_fit_decreasing_needs(rows, dp_size):
    needed = len(first_fit_decreasing(np.array([len(row) for row in rows]), BUDGET))
    assert len(pack_on_all_ranks(rows, dp_size)[0].packs) == -(-needed // dp_size)


# A long-tailed mix like that of the paper's trajectories: mean 3771 tokens, up to 16384.
def log_normal_lengths(seed, batch=512):
    return np.clip(
        np.random.default_rng(seed).lognormal(np.log(3771) - 0.8**2 / 2, 0.8, batch).round().astype(int), 16, 16384
    )


@pytest.mark.parametrize("seed", range(5))
def test_a_long_tailed_mix_fills_the_packs_and_the_ranks_evenly(seed):
    lengths = log_normal_lengths(seed)
    assert lengths.sum() / (len(first_fit_decreasing(lengths, 16384)) * 16384) >= 0.97
    for ranks, most in (
        (1, 1.0),
        (2, 1.01),
        (8, 1.01),
        (32, 1.01),
        (64, 1.15),
    ):  # 64: 2 packs a rank, and rows of a whole pack
        hands = plan(lengths, 16384, ranks, 20_000.0)
        assert sorted(i for hand in hands for pack in hand for i in pack) == list(range(512))  # the batch is exact
        assert all(lengths[pack].sum() <= 16384 for hand in hands for pack in hand)
        costs = [sum(float((lengths[pack] + lengths[pack] ** 2 / 20_000).sum()) for pack in hand) for hand in hands]
        assert max(costs) <= most * np.mean(costs) * (1 + 1e-12)  # the dearest rank is what the others wait for
    rows = RowSet(lengths, 512.0, lambda i: make_row([1], [2] * (lengths[i] - 1)))
    batch = pack_rows(rows, 16384, dp_size=8)
    assert batch.sequences == 512 and batch.tokens / batch.positions >= 0.97


@given(st.lists(st.integers(1, BUDGET), min_size=1, max_size=60))
def test_first_fit_decreasing(lengths):
    lengths = np.array(lengths)
    packs = first_fit_decreasing(lengths, BUDGET)
    totals = [int(lengths[pack].sum()) for pack in packs]
    assert max(totals) <= BUDGET
    # No two packs could have been one: the first row of the later one would have fitted into the earlier.
    assert all(a + b > BUDGET for i, a in enumerate(totals) for b in totals[i + 1 :])


@given(st.lists(st.floats(1, 100), min_size=1, max_size=40), st.integers(1, 6))
def test_dealing_is_complete_and_even(costs, ranks):
    hands = deal(costs, ranks)
    assert sorted(pack for hand in hands for pack in hand) == list(range(len(costs)))
    assert max(map(len, hands)) <= -(-len(costs) // ranks)


def test_ranks_are_balanced_by_attention_too():
    """One sequence of 1024 tokens costs what many short ones of more tokens do."""
    lengths = np.array((1024, *[512] * 2, *[256] * 4, *[64] * 16))
    long, short = plan(lengths, 4096, 2, balanced_length=256.0)
    tokens, costs = zip(
        *((lengths[pack].sum(), (lengths[pack] + lengths[pack] ** 2 / 256).sum()) for [pack] in (long, short)),
        strict=True,
    )
    assert max(costs) <= 1.02 * np.mean(costs)
    assert tokens[0] < 0.7 * tokens[1]


def test_a_padding_pack_carries_no_weight():
    batches = [pack_rows([make_row([1], [2, 3])], 8, dp_rank=rank, dp_size=2) for rank in (0, 1)]
    padding = batches[1].packs[0]
    assert (
        padding.cu_seqlens.tolist() == [0]
        and padding.rows == []
        and not padding.weights.any()
        and (padding.labels == NO_LABEL).all()
    )
    assert [b.loss_tokens for b in batches] == [2, 2]


def test_bad_rows():
    with pytest.raises(UserError, match="sequence of 9 tokens does not fit into the token budget of 8"):
        pack_rows([make_row([1], [2] * 8)], 8)
    with pytest.raises(ValueError, match="no rows"):
        pack_rows([], 8)
    with pytest.raises(ValueError, match="weight on its first token"):
        pack_rows([Row(np.array([1, 2]), np.ones(2, np.float32))], 8)
    with pytest.raises(ValueError, match="streams"):
        pack_rows([make_row([1], [2]), make_row([1], [2], {"advantage": 1.0})], 8)
    with pytest.raises(ValueError, match="empty"):
        pack_rows([Row(np.zeros(0, np.int64), np.zeros(0, np.float32))], 8)


def test_packing_has_no_python_loop_over_tokens():
    """Ten times the tokens in as many rows execute as many lines, including those of NumPy's Python code.

    The first call and a garbage collection execute a few more; a loop over tokens would execute 23,000 more.
    """

    def lines_executed(tokens: int) -> int:
        rows = [make_row([1] * tokens, [2] * tokens, {"advantage": 0.5}) for _ in range(64)]
        count = 0

        def trace(frame, event, argument):
            nonlocal count
            count += event == "line"
            return trace

        before = sys.gettrace()
        sys.settrace(trace)
        try:
            pack = pack_rows(rows, 64 * 2 * tokens)
        finally:
            sys.settrace(before)
        assert pack.tokens >= 64 * (2 * tokens - 1)
        return count

    assert abs(lines_executed(200) - lines_executed(20)) < 64
