"""The order of the samples."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pctrain.data.sampler import ShuffledSampler


@given(st.integers(1, 50), st.integers(1, 70), st.integers(0, 1000))
def test_epochs_are_permutations_and_batches_run_across_their_ends(size, batch, seed):
    sampler = ShuffledSampler([size], batch, seed)
    steps = -(-3 * size // batch)
    stream = []
    for step in range(steps):
        indices = sampler.indices(step)
        assert len(indices) == batch
        stream += indices
    for epoch in range(3):
        assert sorted(stream[epoch * size : (epoch + 1) * size]) == list(range(size))


@given(st.integers(1, 50), st.integers(1, 70), st.integers(0, 1000), st.lists(st.integers(0, 300), max_size=8))
def test_a_step_is_a_function_of_seed_and_step_alone(size, batch, seed, steps):
    used = ShuffledSampler([size], batch, seed)
    assert [used.indices(s) for s in steps] == [ShuffledSampler([size], batch, seed).indices(s) for s in steps]


def test_seeds_and_epochs_differ():
    a, b = ShuffledSampler([100], 100, 0), ShuffledSampler([100], 100, 1)
    assert a.indices(0) != b.indices(0) and a.indices(0) != a.indices(1)
    assert a.indices(1) != b.indices(0)  # (seed, epoch) is no sum
    first = Counter(ShuffledSampler([4], 4, seed).indices(0)[0] for seed in range(400))
    assert all(60 <= first[i] <= 140 for i in range(4))  # 100 expected, binomial standard deviation 8.7


SOURCES = st.lists(st.tuples(st.integers(1, 30), st.floats(0.05, 3.5)), min_size=1, max_size=4)


@given(SOURCES, st.integers(1, 70), st.integers(0, 100))
def test_sources_come_by_their_weights_and_each_sample_as_often_as_the_others(sources, batch, seed):
    sizes, weights = zip(*sources, strict=True)
    sampler = ShuffledSampler(sizes, batch, seed, weights)
    epochs = 5
    expected = [int(epochs * weight * size) for size, weight in sources]
    stream = [i for step in range(-(-sum(expected) // batch)) for i in sampler.indices(step)][: sum(expected)]
    first = 0
    for size, shown in zip(sizes, expected, strict=True):
        counts = [Counter(stream)[i] for i in range(first, first + size)]
        assert sum(counts) == shown and max(counts) - min(counts) <= 1
        first += size


def test_sources_are_mixed_in_an_epoch():
    stream = ShuffledSampler([500, 500], 1000, 0).indices(0)
    assert 200 < sum(i < 500 for i in stream[:500]) < 300  # 250 expected, hypergeometric standard deviation 7.9


def test_one_source_of_weight_one_is_the_plain_permutation():
    """Its order is that of runs made before there were several sources."""
    stream = [i for step in range(4) for i in ShuffledSampler([10], 5, 7).indices(step)]
    assert stream == [*np.random.default_rng([7, 0]).permutation(10), *np.random.default_rng([7, 1]).permutation(10)]


def test_half_a_weight_shows_the_other_half_in_the_next_epoch():
    sampler = ShuffledSampler([20], 10, 3, [0.5])
    assert sorted(sampler.indices(0) + sampler.indices(1)) == list(range(20))
    assert sampler.indices(0) != ShuffledSampler([20], 10, 4, [0.5]).indices(0)


@pytest.mark.parametrize(
    "arguments", [([0], 1, 0), ([], 1, 0), ([1], 0, 0), ([1], 1, -1), ([1], 1, 0, [0.0]), ([1], 1, 0, [1.0, 1.0])]
)
def test_impossible_sizes(arguments):
    with pytest.raises(ValueError, match="must be above 0"):
        ShuffledSampler(*arguments)
