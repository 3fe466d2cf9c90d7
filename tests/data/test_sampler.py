"""The order of the samples."""

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pctrain.data.sampler import ShuffledSampler


@given(st.integers(1, 50), st.integers(1, 70), st.integers(0, 1000))
def test_epochs_are_permutations_and_batches_run_across_their_ends(size, batch, seed):
    sampler = ShuffledSampler(size, batch, seed)
    steps = -(-3 * size // batch)
    stream = []
    for step in range(steps):
        indices = sampler.indices(step)
        assert len(indices) == batch
        stream += indices
    for epoch in range(3):
        assert sorted(stream[epoch * size: (epoch + 1) * size]) == list(range(size))


@given(st.integers(1, 50), st.integers(1, 70), st.integers(0, 1000), st.lists(st.integers(0, 300), max_size=8))
def test_a_step_is_a_function_of_seed_and_step_alone(size, batch, seed, steps):
    used = ShuffledSampler(size, batch, seed)
    assert [used.indices(s) for s in steps] == [ShuffledSampler(size, batch, seed).indices(s) for s in steps]


def test_seeds_and_epochs_differ():
    a, b = ShuffledSampler(100, 100, 0), ShuffledSampler(100, 100, 1)
    assert a.indices(0) != b.indices(0) and a.indices(0) != a.indices(1)
    assert a.indices(1) != b.indices(0)  # (seed, epoch) is no sum
    first = Counter(ShuffledSampler(4, 4, seed).indices(0)[0] for seed in range(400))
    assert all(60 <= first[i] <= 140 for i in range(4))  # 100 expected, binomial standard deviation 8.7


@pytest.mark.parametrize("arguments", [(0, 1, 0), (1, 0, 0), (1, 1, -1)])
def test_impossible_sizes(arguments):
    with pytest.raises(ValueError):
        ShuffledSampler(*arguments)
