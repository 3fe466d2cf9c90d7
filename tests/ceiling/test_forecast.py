"""The compute that a score takes, the score that a budget buys, and the points that a fit did not see."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pctrain.ceiling.fit import fit_ceiling
from pctrain.ceiling.forecast import at_budgets, held_out, reach
from pctrain.ceiling.paper_fit import paper_fit
from pctrain.ceiling.posterior import rise

LEVEL, GAIN, B, C = 60.0, 12.0, 1.5, 20.0
X = np.arange(1, 41) * 2.5


def scores(seed, x=X, rho=0.0, sd=0.5):
    rng = np.random.default_rng(seed)
    noise = np.zeros(len(x))
    for i, z in enumerate(rng.normal(size=len(x)) * sd):
        noise[i] = z if i == 0 else rho * noise[i - 1] + np.sqrt(1 - rho**2) * z
    return LEVEL + GAIN * rise(np.asarray(x), B, C) + noise


@pytest.fixture(scope="module")
def fit():
    return fit_ceiling(X, scores(0), LEVEL)


def test_a_score_below_the_ceiling_takes_the_compute_that_the_truth_takes(fit):
    for score in (66.0, 69.0, 70.0):
        share = (score - LEVEL) / GAIN
        truth = C * (share / (1 - share)) ** (1 / B)
        found = reach(fit, score)
        assert found.probability > 0.95 and found.eflops_low <= truth <= found.eflops_high
        assert found.eflops == pytest.approx(truth, rel=0.35)


def test_scores_at_the_ends(fit):
    never = reach(fit, 90.0)
    assert never.probability < 0.02 and (never.eflops_low, never.eflops, never.eflops_high) == (None, None, None)
    begun = reach(fit, 40.0)
    assert (begun.probability, begun.eflops_low, begun.eflops, begun.eflops_high) == (pytest.approx(1), 0, 0, 0)
    doubtful = reach(fit, fit.a_post)  # as likely as not
    assert (
        doubtful.probability == pytest.approx(0.5, abs=0.01)
        and doubtful.eflops_low > X[-1]
        and doubtful.eflops_high is None
    )


@settings(max_examples=30)
@given(st.floats(55, 80), st.floats(55, 80))
def test_more_takes_more_and_its_interval_is_that_of_the_curve(fit, one, other):
    low, high = (reach(fit, score) for score in sorted((one, other)))
    assert low.probability >= high.probability - 1e-12
    for name in ("eflops_low", "eflops", "eflops_high"):
        if getattr(high, name) is not None:
            assert getattr(low, name) <= getattr(high, name)
    if high.eflops is not None and high.eflops > 0:  # the curve has come to the score by then in half of the draws
        there = fit.draws.scores(np.array([high.eflops]))[0] >= high.score - 1e-9
        assert fit.draws.weight @ there == pytest.approx(0.5, abs=0.01)


def test_a_budget_buys_the_curve_and_a_measurement_is_less_sure(fit):
    budgets = [0.0, 10.0, 100.0, 1e6]
    found = at_budgets(fit, budgets)
    median, low, _ = fit.curve(budgets)
    assert [entry.score for entry in found] == median.tolist() and [entry.low for entry in found] == low.tolist()
    for entry in found:
        assert entry.measured_low < entry.low <= entry.score <= entry.high < entry.measured_high
    assert found[-1].score == pytest.approx(fit.a_post, abs=0.3)


def test_the_predictive_interval_holds_scores_not_seen():
    inside = []
    for seed in range(25):
        y = scores(seed, rho=0.3)
        fit = fit_ceiling(X[:28], y[:28], LEVEL)
        inside.append(held_out(fit, X[28:], y[28:]).inside)
    assert 0.83 <= np.mean(inside) <= 0.97  # nominal 0.9; sd of the mean of 300 correlated points about 0.025


def test_the_next_score_remembers_the_last_one():
    y = scores(3, rho=0.9, sd=1.0)
    y[-4:] = y[-5] + 3.0  # noise that stays: the next measurement is likelier to be high than the curve says
    fit = fit_ceiling(X, y, LEVEL)
    above = fit.predict([X[-1] + 2.5, X[-1] + 250])[0] - fit.curve([X[-1] + 2.5, X[-1] + 250])[0]
    assert above[0] > 0.4 and abs(above[1]) < 0.2


def test_the_paper_method_forecasts_points_without_intervals():
    fit = paper_fit(X, scores(1), LEVEL)
    found = reach(fit, 68.0)
    assert fit.curve([found.eflops])[0] == pytest.approx(68.0) and (found.probability, found.eflops_low) == (None, None)
    assert reach(fit, 99.0).eflops is None
    (entry,) = at_budgets(fit, [50.0])
    assert entry.score == fit.curve([50.0])[0] and entry.measured_high is None
    rest = held_out(fit, X[-3:], fit.curve(X[-3:]) + 1.0)
    assert (rest.points, rest.inside) == (3, None) and rest.rmse == pytest.approx(1.0)
    nothing = held_out(fit, X[:0], X[:0])
    assert (nothing.points, nothing.rmse, nothing.inside) == (0, None, None)
