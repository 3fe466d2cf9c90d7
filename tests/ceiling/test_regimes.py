"""Regimes on the published losses, on made-up curves with every regime, and the choice of RL start points."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pctrain.ceiling import regimes
from pctrain.common.errors import UserError

# Validation losses read off the paper's figure to two digits, with the regime that it shades.
EASY_X = [0, 19.8, 39.5, 59.3, 79.0, 98.8, 335.9]
EASY = [0.71, 0.45, 0.44, 0.46, 0.47, 0.47, 0.87]
EASY_SHADED = ["adaptive", "stable", "stable", "mild", "mild", "mild", "severe"]
S1K_X = [0, 0.6, 1.1, 1.7, 2.3, 2.9]
S1K = [0.71, 0.52, 0.51, 0.53, 0.55, 0.56]
S1K_SHADED = ["adaptive", "stable", "stable", "mild", "mild", "mild"]


def test_s1k_agrees_with_the_papers_shading():
    assert regimes.classify(S1K_X, S1K) == S1K_SHADED


def test_easy102k_agrees_but_for_one_point_that_two_digits_cannot_decide():
    # 0.45 / 0.44 = 1.023 is just outside the 2% band.
    assert regimes.classify(EASY_X, EASY) == ["adaptive", "adaptive", "stable", "mild", "mild", "mild", "severe"]
    # Losses that print as the same two digits (each within 0.005) give the shading at every point.
    within = [0.71, 0.449, 0.441, 0.46, 0.47, 0.47, 0.87]
    assert np.abs(np.subtract(within, EASY)).max() < 0.005
    assert regimes.classify(EASY_X, within) == EASY_SHADED


def test_a_point_that_leaves_the_band_and_comes_back_after_is_transient():
    losses = [2.0, 1.01, 1.05, 1.0, 1.3, 1.015, 1.05, 1.2]
    assert regimes.classify(range(8), losses) == [
        "adaptive",
        "stable",
        "transient",
        "stable",
        "transient",
        "stable",
        "mild",
        "severe",
    ]


def test_band_edges_belong_to_stable_and_to_severe():
    # Powers of two: the products are exact, so the edges are met exactly.
    assert regimes.classify([0, 1, 2, 3], [1.0, 1.25, 1.26, 1.5], delta=0.25, delta2=0.5) == [
        "stable",
        "stable",
        "mild",
        "severe",
    ]


@given(st.lists(st.floats(0.01, 10), min_size=1, max_size=40))
def test_every_point_has_a_regime_in_order(losses):
    names = regimes.classify(range(len(losses)), losses)
    assert len(names) == len(losses) and set(names) <= set(regimes.REGIMES)
    assert names[int(np.argmin(losses))] == "stable"
    inside = [n for n in names if n not in ("adaptive",)]
    assert names[: len(names) - len(inside)] == ["adaptive"] * (
        len(names) - len(inside)
    )  # adaptive comes first, and only there
    last = max(i for i, n in enumerate(names) if n == "stable")
    assert set(names[last + 1 :]) <= {"mild", "severe"}


@pytest.mark.parametrize(
    ("x", "losses", "says"),
    [
        ([], [], "one or more"),
        ([0, 1], [0.5], "as many"),
        ([0, 1], [0.5, float("nan")], "not finite"),
        ([0, 0], [0.5, 0.4], "increase"),
        ([0, 1], [0.5, 0.0], "above 0"),
    ],
)
def test_bad_curves_are_refused(x, losses, says):
    with pytest.raises(UserError, match=says):
        regimes.classify(x, losses)


STEPS = list(range(0, 1450, 90))
CHECKPOINTS = [90 * i for i in range(1, 17)]


def overfitting(steps, best=540):
    """Falls to its minimum at `best` and doubles by the end."""
    t = np.asarray(steps) / best
    return np.where(t < 1, 1 + 1.5 * (1 - t) ** 2, 1 + 0.3 * (t - 1) ** 2)


def test_starts_of_a_run_with_all_regimes():
    assert regimes.starts(STEPS, overfitting(STEPS), CHECKPOINTS) == {"early": 270, "stable": 540, "overfit": 1440}


def test_a_run_that_still_falls_has_no_overfit_start():
    steps = [0, 100, 200, 300, 400]
    assert regimes.starts(steps, [3.0, 2.0, 1.5, 1.2, 1.0], steps) == {"early": 200, "stable": 400, "overfit": None}


def test_early_stays_adaptive_where_half_way_is_stable_already():
    steps = [0, 100, 200, 300, 400, 500]
    assert regimes.starts(steps, [3.0, 1.3, 1.01, 1.01, 1.0, 1.005], steps)["early"] == 100


def test_no_adaptive_checkpoint_gives_no_early_start():
    assert regimes.starts([0, 100, 200], [3.0, 1.0, 1.2], [100, 200]) == {"early": None, "stable": 100, "overfit": 200}


def test_checkpoints_between_validations_and_outside_the_curve():
    steps, losses = [100, 300, 500], [2.0, 1.0, 1.5]
    assert regimes.starts(steps, losses, [200, 310, 450, 700]) == {"early": 200, "stable": 310, "overfit": 450}
    assert regimes.starts(steps, losses, [0, 700]) == {"early": None, "stable": None, "overfit": None}
