"""Ceilings of published curves, of simulated truth, and of difficult curves: short, flat, collapsed, with outliers."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.ceilings.published import FILE as PUBLISHED_FILE
from benchmarks.ceilings.published import PUBLISHED
from pctrain.ceiling import collapse, posterior
from pctrain.ceiling.fit import VERDICTS, fit_ceiling
from pctrain.ceiling.posterior import rise
from pctrain.common.errors import UserError
from pctrain.report.curves import read_curves


def curve(x, p_sft, gain, c, b=1.5, sd=0.5, rho=0.2, rng=None):
    """Scores of a sigmoid with AR(1) noise."""
    noise = np.zeros(len(x))
    for i, z in enumerate((rng or np.random.default_rng(0)).normal(size=len(x)) * sd):
        noise[i] = z if i == 0 else rho * noise[i - 1] + np.sqrt(1 - rho**2) * z
    return np.clip(p_sft + gain * rise(np.asarray(x, float), b, c) + noise, 0, 100)


def test_published_ceilings_from_the_first_71_percent():
    errors = {}
    for c in read_curves(PUBLISHED_FILE):
        n = int(0.71 * len(c.eflops))
        fit = fit_ceiling(c.eflops[:n], c.scores[:n], c.p_sft)
        errors[c.name] = abs(fit.a_post - PUBLISHED[c.dataset, c.start_step])
        if fit.verdict == "identified":
            # Published ceilings come from choices per curve and a P_sft with an error of 0.9 points: a sanity check.
            assert errors[c.name] < 1.5, c.name
    assert len(errors) == 16
    assert np.median(list(errors.values())) <= 0.7
    assert np.mean(list(errors.values())) <= 1.0


def test_the_late_collapse_of_a_published_curve_is_cut():
    s1k_62 = read_curves(PUBLISHED_FILE)[0]
    fit = fit_ceiling(s1k_62.eflops, s1k_62.scores, s1k_62.p_sft)
    assert fit.verdict == "collapsed"
    assert 145 < fit.collapsed_at < 160  # scores go from 77 to 58 there
    assert fit.used.sum() == fit.n_used < fit.n_points and not fit.used[s1k_62.eflops >= fit.collapsed_at].any()


def test_the_interval_holds_simulated_ceilings():
    rng = np.random.default_rng(3)
    covered, close = 0, 0
    for _ in range(40):
        n = int(rng.integers(20, 70))
        x = 3.0 * np.arange(1, n + 1)
        c = x[-1] / np.exp(rng.uniform(np.log(2), np.log(20)))
        p, gain = rng.uniform(60, 78), rng.uniform(2, 12)
        y = curve(x, p, gain, c, b=np.exp(rng.normal(np.log(1.5), 0.4)), rng=rng)
        fit = fit_ceiling(x, y, p + rng.normal() * 0.5)
        covered += fit.a_post_low <= p + gain <= fit.a_post_high
        close += abs(fit.a_post - p - gain) < 2
    assert covered >= 32  # nominal 90% of 40 is 36, sd 1.9: two sd below
    assert close >= 32


def test_a_curve_seen_to_its_end_is_identified_and_the_curve_follows_it():
    x = np.arange(1, 61) * 4.0
    truth = 60 + 12 * rise(x, 1.5, 12.0)
    fit = fit_ceiling(x, curve(x, 60, 12, 12.0), 60.2)
    assert fit.verdict == "identified" and abs(fit.a_post - 72) < 1
    assert fit.pl_rl == fit.a_post - 60.2 and fit.share_seen > 0.9
    median, low, high = fit.curve(x)
    assert median.shape == (60,) and (low <= median).all() and (median <= high).all()
    assert np.abs(median - truth).max() < 1  # noise sd 0.5 over 60 points
    assert fit.curve([0.0])[0][0] == pytest.approx(60, abs=1)
    far = fit.curve([1e9])
    assert [v[0] for v in far] == pytest.approx(
        [fit.a_post, fit.a_post_low, fit.a_post_high], abs=0.3
    )  # B may be small: not quite there


def test_a_rise_that_has_not_bent_is_a_lower_bound_with_a_wide_interval():
    x = np.arange(1, 31) * 4.0
    fit = fit_ceiling(x, curve(x, 60, 30, 240.0), 60)
    assert fit.verdict == "lower_bound" and fit.a_post_high - fit.a_post_low > 4


def test_no_gain_is_flat_and_no_ceiling():
    x = np.arange(1, 41) * 2.0
    assert fit_ceiling(x, curve(x, 70, 0, 10.0), 70).verdict == "flat"


def test_a_collapse_hides_neither_in_its_own_noise_nor_from_the_first_point():
    x = np.arange(1, 41) * 2.0
    y = curve(x, 60, 10, 10.0)
    y[25:] = 50 + 15 * np.random.default_rng(1).uniform(-1, 1, 15)
    fit = fit_ceiling(x, y, 60)
    assert fit.verdict == "collapsed" and x[24] < fit.collapsed_at <= x[29] and abs(fit.a_post - 70) < 3
    at_once = fit_ceiling(x, np.full(40, 20.0), 60)
    assert at_once.verdict == "collapsed" and at_once.n_used == 0 and at_once.collapsed_at == x[0]


def test_isolated_outliers_are_left_out_and_move_nothing():
    x = np.arange(1, 41) * 2.0
    y = curve(x, 60, 10, 10.0)
    spoiled = y.copy()
    spoiled[[12, 30]] = 20, 95
    clean, fit = fit_ceiling(x, y, 60), fit_ceiling(x, spoiled, 60)
    assert fit.n_used == 38 and not fit.used[[12, 30]].any()
    assert fit.a_post == pytest.approx(clean.a_post, abs=0.2)  # two points of 40 less


def test_noise_alone_is_no_collapse_and_no_outlier():
    rng = np.random.default_rng(5)
    false_alarms = 0
    for _ in range(300):
        x = np.arange(1, 41) * 1.0
        y = curve(x, 60, 8, 8.0, sd=1.5, rng=rng)
        false_alarms += collapse.onset(y, 60, collapse.noise_sd(y, 0.25)) is not None
    assert false_alarms <= 9  # 3%


def test_noise_that_remembers_is_no_collapse():
    """AR(1) noise hides from its nearest neighbours: by them alone one curve in ten would be called collapsed."""
    rng, x = np.random.default_rng(5), np.arange(1, 81) * 1.0
    false_alarms = sum(
        collapse.used_points(curve(x, 60, 8, 8.0, sd=0.8, rho=0.6, rng=rng), 60, None)[1] is not None
        for _ in range(200)
    )
    assert false_alarms <= 8  # 4%


@pytest.mark.parametrize("n", range(1, 12))
def test_few_points_are_too_short_with_a_wide_interval(n):
    x = np.arange(1, n + 1) * 0.01
    y = curve(x, 45, 40, 0.04, sd=2.2, rng=np.random.default_rng(n))
    fit = fit_ceiling(x, y, 45, score_se=2.2, p_sft_se=2.2)
    assert fit.verdict == "too_short" and fit.a_post_high <= 100
    assert fit.a_post_high - fit.a_post_low > 4
    assert fit.a_post_high > y.max() - 3 * 2.2  # what was seen, three standard errors off, is never above the interval


def test_the_same_input_gives_the_same_digits():
    x = np.arange(1, 21) * 2.0
    rows = [json.dumps(fit_ceiling(x, curve(x, 60, 10, 10.0), 60).as_row("S1K", 62), allow_nan=False) for _ in range(2)]
    assert rows[0] == rows[1]
    assert list(json.loads(rows[0])) == [
        "dataset",
        "start_step",
        "p_sft",
        "a_post",
        "a_post_low",
        "a_post_high",
        "pl_rl",
        "c_mid",
        "b",
        "eps",
        "verdict",
        "n_points",
        "n_used",
        "collapsed_at",
        "prior_shift",
    ]


def test_the_unit_of_compute_does_not_matter():
    x = np.arange(1, 31) * 2.0
    y = curve(x, 60, 10, 10.0)
    large, small = fit_ceiling(x, y, 60), fit_ceiling(x * 1e-7, y, 60)
    # Equal up to rounding of x * 1e-7, which moves the weights by about 1e-12.
    assert small.a_post == pytest.approx(large.a_post, rel=1e-6) and small.c_mid == pytest.approx(
        large.c_mid * 1e-7, rel=1e-6
    )


def test_the_shift_under_wide_priors_separates_the_prior_from_the_data():
    x = np.arange(1, 41) * 3.0
    seen, begun = (fit_ceiling(x, curve(x, 60, 10, c), 60) for c in (8.0, 240.0))
    assert abs(seen.prior_shift) < 0.2 and begun.prior_shift > 2
    assert seen.as_row("S1K", 62)["prior_shift"] == seen.prior_shift


def test_no_draw_is_above_the_highest_possible_score():
    x = np.arange(1, 31) * 2.0
    y = np.minimum(curve(x, 60, 12, 20.0), 71.5)
    fit = fit_ceiling(x, y, 60, max_score=71.5)
    assert (fit.draws.l + fit.draws.d).max() <= 71.5 + 1e-9 and fit.predict([1e6])[2][0] <= 71.5
    assert fit_ceiling(x, y, 60).a_post_high > 71.5


def test_a_fine_grid_around_the_posterior_agrees_with_a_finer_one_over_all(monkeypatch):
    x = np.arange(1, 31) * 2.0
    y = curve(x, 60, 10, 10.0)
    fit = fit_ceiling(x, y, 60)
    monkeypatch.setattr(posterior, "COARSE", (33, 49, 9, 17))
    monkeypatch.setattr(posterior, "FINE", (41, 61, 13, 21))
    finer = fit_ceiling(x, y, 60)
    sd = (finer.a_post_high - finer.a_post_low) / 3.3
    for name in ("a_post_low", "a_post", "a_post_high"):
        assert getattr(fit, name) == pytest.approx(getattr(finer, name), abs=0.1 * sd)


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.tuples(st.floats(1e-6, 10), st.floats(0, 100)), min_size=1, max_size=30),
    st.floats(0, 100),
    st.booleans(),
)
def test_any_valid_curve_gives_a_sound_answer(points, p_sft, with_errors):
    x = np.cumsum([step for step, _ in points])
    errors = {"score_se": 2.0, "p_sft_se": 2.0} if with_errors else {}
    fit = fit_ceiling(x, [score for _, score in points], p_sft, **errors)
    numbers = [fit.a_post_low, fit.a_post, fit.a_post_high, fit.pl_rl, fit.c_mid, fit.b, fit.eps, fit.sigma]
    assert np.isfinite(numbers).all() and fit.a_post_low <= fit.a_post <= fit.a_post_high <= 100 + 1e-9
    assert fit.verdict in VERDICTS and fit.eps >= 0 and fit.c_mid > 0 and fit.b > 0
    assert (fit.collapsed_at is not None) == (fit.verdict == "collapsed")


@pytest.mark.parametrize(
    ("x", "y", "p_sft", "says"),
    [
        ([], [], 50, "one or more"),
        ([1, 2], [50], 50, "as many"),
        ([1, 2], [50, float("nan")], 50, "finite"),
        ([1, 2], [50, 60], float("nan"), "finite"),
        ([-1, 2], [50, 60], 50, "0 or more"),
        ([1, 1], [50, 60], 50, "increase"),
        ([2, 1], [50, 60], 50, "increase"),
        ([0], [50], 50, "above 0"),
        ([1, 2], [50, 101], 50, "percent"),
        ([1, 2], [50, 60], -1, "percent"),
        (["a", 2], [50, 60], 50, "numbers"),
    ],
)
def test_bad_input_is_refused(x, y, p_sft, says):
    with pytest.raises(UserError, match=says):
        fit_ceiling(x, y, p_sft)


@pytest.mark.parametrize("name", ["score_se", "p_sft_se"])
@pytest.mark.parametrize("value", [0.0, -1.0, float("nan")])
def test_a_standard_error_must_be_above_zero(name, value):
    with pytest.raises(UserError, match=name):
        fit_ceiling([1, 2], [50, 60], 50, **{name: value})
