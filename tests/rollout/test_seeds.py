from hypothesis import given, settings
from hypothesis import strategies as st

from pctrain.rollout.seeds import sampling_seed

prompts = st.one_of(st.integers(0, 10**9), st.text())
keys = st.tuples(
    st.integers(0, 2**31), st.sampled_from(["train", "eval"]), st.integers(0, 10**6), prompts, st.integers(0, 64)
)


@settings(deadline=None)  # a shared machine stalls
@given(keys, keys)
def test_seeds_differ_where_anything_differs(one, other):
    assert 0 <= sampling_seed(*one) < 2**62
    assert (sampling_seed(*one) == sampling_seed(*other)) == (one == other)


def test_seeds_are_fixed_for_all_time():
    """A resumed run draws what the killed one would have: the values may not depend on process or version."""
    assert sampling_seed(0, "train", 1, "problems.jsonl:7", 3) == 2346006321574736387
