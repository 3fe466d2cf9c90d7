"""Scores and their intervals, against enumeration, scipy, the published formulas and simulated benchmarks."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from pctrain.evaluate import statistics
from pctrain.evaluate.statistics import Estimate


@pytest.mark.parametrize("samples", range(1, 8))
def test_pass_at_k_is_the_share_of_all_draws_that_hold_a_right_sample(samples):
    for right in range(samples + 1):
        of = [1] * right + [0] * (samples - right)
        for k in range(1, samples + 1):
            draws = list(itertools.combinations(of, k))
            assert statistics.pass_at_k(samples, right, k) == pytest.approx(
                sum(any(draw) for draw in draws) / len(draws), abs=1e-12
            )


def test_pass_at_k_of_many_samples_is_the_papers_product():
    for right, k in [(1, 1), (3, 100), (150, 7), (0, 200), (200, 1)]:
        product = 1.0 if 200 - right < k else 1 - np.prod(1 - k / np.arange(200 - right + 1, 201))
        assert statistics.pass_at_k(200, right, k) == pytest.approx(product, abs=1e-12)
    with pytest.raises(ValueError, match="pass@5 of 4 samples"):
        statistics.pass_at_k(4, 1, 5)


def test_the_k_of_pass_at_k():
    assert [statistics.powers_of_two(n) for n in (1, 2, 6, 16)] == [[1], [1, 2], [1, 2, 4, 6], [1, 2, 4, 8, 16]]


@pytest.mark.parametrize("right, n", [(0, 25), (25, 25), (3, 40), (118, 237)])
def test_one_sample_a_problem_is_agresti_and_coulls_interval(right, n):
    found = statistics.mean([1] * right + [0] * (n - right))
    z = stats.norm.ppf(0.975)
    centre = (right + z**2 / 2) / (n + z**2)
    reach = z * math.sqrt(centre * (1 - centre) / (n + z**2))
    assert (found.low, found.high) == pytest.approx((max(0, centre - reach), min(1, centre + reach)))
    wilson = stats.binomtest(right, n).proportion_ci(method="wilson")  # shares its centre, and lies within it
    assert found.low <= wilson.low + 1e-12 and wilson.high <= found.high + 1e-12
    assert found.high - found.low < 1.6 * (wilson.high - wilson.low)


shares = st.lists(st.sampled_from([0, 0.25, 0.5, 0.75, 1]), min_size=1, max_size=40)


@given(shares)
def test_an_interval_holds_the_score_and_is_never_a_point(values):
    found = statistics.mean(values)
    assert 0 <= found.low <= found.value + 1e-12 and found.value <= found.high + 1e-12 and found.high <= 1
    assert found.high - found.low > 0.5 / len(values) and found.se > 0


@given(shares, st.randoms(use_true_random=False))
def test_an_interval_holds_the_difference_is_never_a_point_and_changes_sign_with_it(values, random):
    others = random.sample(values, len(values))
    found, back = statistics.difference(values, others), statistics.difference(others, values)
    assert -1 <= found.low <= found.value + 1e-12 and found.value <= found.high + 1e-12 and found.high <= 1
    assert found.high - found.low > 0.5 / len(values)
    assert (back.low, back.value, back.high) == pytest.approx((-found.high, -found.value, -found.low))


@pytest.mark.parametrize("both, gained, lost, neither", [(10, 6, 2, 12), (0, 0, 0, 9), (30, 9, 0, 1)])
def test_one_sample_a_problem_is_agresti_and_mins_interval(both, gained, lost, neither):
    new, old = (
        [1] * both + [1] * gained + [0] * lost + [0] * neither,
        [1] * both + [0] * gained + [1] * lost + [0] * neither,
    )
    n, b, c = len(new) + 2, gained + 0.5, lost + 0.5  # half a problem more in each of the four cells
    reach = stats.norm.ppf(0.975) * math.sqrt((b + c) - (b - c) ** 2 / n) / n
    found = statistics.difference(new, old)
    assert (found.low, found.high) == pytest.approx(((b - c) / n - reach, (b - c) / n + reach))


def test_a_mean_of_benchmarks_combines_the_distances_to_their_bounds():
    parts = [Estimate(0.9, 0.8, 0.94), Estimate(0.2, 0.15, 0.3)]
    found = statistics.combined(parts, [300, 100])
    assert found.value == pytest.approx(0.725)
    assert found.value - found.low == pytest.approx(math.hypot(0.75 * 0.1, 0.25 * 0.05))
    assert found.high - found.value == pytest.approx(math.hypot(0.75 * 0.04, 0.25 * 0.1))
    alone = statistics.combined(parts[:1], [7])
    assert (alone.low, alone.value, alone.high) == pytest.approx((0.8, 0.9, 0.94))


@pytest.mark.parametrize(
    "problems, samples, a, b", [(25, 1, 1, 9), (25, 16, 0.2, 1), (262, 1, 3, 3), (60, 4, 8, 0.6), (30, 8, 20, 20)]
)
def test_95_percent_of_simulated_benchmarks_are_in_their_intervals(problems, samples, a, b):
    """Difficulties from a Beta distribution: rare and frequent successes, all alike and all or nothing."""
    rng = np.random.default_rng(0)
    truth, inside, turns = a / (a + b), 0, 1500
    for _ in range(turns):
        right = rng.binomial(samples, rng.beta(a, b, problems)) / samples
        found = statistics.mean(right)
        inside += found.low <= truth <= found.high
    assert inside / turns > 0.935


def test_95_percent_of_simulated_differences_and_means_are_in_their_intervals():
    rng = np.random.default_rng(1)
    turns, inside = 1000, np.zeros(2)
    for _ in range(turns):
        parts = []
        for problems in (25, 60):
            hard = rng.beta(0.5, 0.5, problems)
            old, new = (rng.binomial(4, np.clip(hard + by, 0, 1)) / 4 for by in (0, 0.0))
            parts.append((statistics.difference(new, old), statistics.mean(new)))
        difference, mean = (statistics.combined([part[i] for part in parts], [25, 60]) for i in (0, 1))
        inside += [difference.low <= 0 <= difference.high, mean.low <= 0.5 <= mean.high]
    assert (inside / turns > 0.935).all(), inside / turns
