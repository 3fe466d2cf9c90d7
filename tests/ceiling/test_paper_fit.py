"""The paper's pipeline against an independent computation in plain loops, and its answers to what it cannot fit."""

import math

import numpy as np
import pytest

from pctrain.ceiling.paper_fit import least_squares_fit, paper_fit
from pctrain.ceiling.posterior import rise
from pctrain.common.errors import UserError


def sigmoid(x, level, a, b, c):
    return level + (a - level) / (1 + (x / c) ** -b)


def naive_least_squares(x, y, level):
    """Grid over B and C that narrows around its best, A of each in closed form."""
    centre, half = [math.log(1.0), math.log(0.2 * x[-1])], [math.log(20.0), math.log(100.0)]
    for _ in range(12):
        best = None
        for log_b in np.linspace(centre[0] - half[0], centre[0] + half[0], 15):
            for log_c in np.linspace(centre[1] - half[1], centre[1] + half[1], 15):
                b, c = math.exp(min(max(log_b, math.log(0.05)), math.log(20))), math.exp(log_c)
                s = 1 / (1 + (x / c) ** -b)
                a = min(max(level + (s @ (y - level)) / (s @ s), level), 100.0)
                loss = ((y - sigmoid(x, level, a, b, c)) ** 2).sum()
                if best is None or loss < best[0]:
                    best = loss, a, b, c, log_b, log_c
        centre, half = [best[4], best[5]], [half[0] / 2, half[1] / 2]
    return best[1], best[2], best[3]


def naive_pipeline(x, y, level, tau, alpha):
    """Appendix F as written: modified z-score until no point is dropped, then C-steps until the kept set stays."""
    kept = list(range(len(x)))
    while True:
        a, b, c = naive_least_squares(x[kept], y[kept], level)
        r = [y[i] - sigmoid(x[i], level, a, b, c) for i in kept]
        middle = np.median(r)
        mad = np.median([abs(v - middle) for v in r])
        left = [i for i, v in zip(kept, r, strict=True) if abs(0.6745 * (v - middle) / mad) <= tau]
        if left == kept:
            break
        kept = left
    rest, h, chosen = kept, math.floor(alpha * len(kept)), kept
    while True:
        a, b, c = naive_least_squares(x[chosen], y[chosen], level)
        nearest = sorted(sorted(rest, key=lambda i: (y[i] - sigmoid(x[i], level, a, b, c)) ** 2)[:h])
        if nearest == chosen:
            return (a, b, c), chosen
        chosen = nearest


def noisy(seed, outliers=()):
    rng = np.random.default_rng(seed)
    x = np.arange(1, 31) * 3.0
    y = 60 + 12 * rise(x, 1.6, 12.0) + 0.5 * rng.normal(size=30)
    for at, size in outliers:
        y[at] += size
    return x, y


@pytest.mark.parametrize(
    ("seed", "tau", "alpha", "outliers"),
    [(0, 3.0, 0.75, ()), (1, 2.5, 0.85, ((7, 6.0), (20, -5.0))), (2, 4.0, 0.75, ((3, -1.8), (12, 4.0), (25, 3.0)))],
)
def test_the_pipeline_is_the_papers(seed, tau, alpha, outliers):
    x, y = noisy(seed, outliers)
    (a, b, c), chosen = naive_pipeline(x, y, 60.0, tau, alpha)
    fit = paper_fit(x, y, 60.0, tau=tau, alpha=alpha)
    assert np.flatnonzero(fit.used).tolist() == chosen
    assert (
        fit.a_post == pytest.approx(a, abs=0.02)
        and fit.b == pytest.approx(b, rel=0.02)
        and fit.c_mid == pytest.approx(c, rel=0.02)
    )
    assert fit.pl_rl == pytest.approx(a - 60, abs=0.02) and fit.n_used == len(chosen) < fit.n_points == 30


def test_least_squares_is_the_least_of_all():
    """Against a fit from the truth: no start gives a smaller sum of squares."""
    for seed in range(5):
        x, y = noisy(seed)
        a, b, c = naive_least_squares(x, y, 60.0)
        found = least_squares_fit(x, y, 60.0)
        assert ((y - sigmoid(x, 60.0, *found)) ** 2).sum() <= ((y - sigmoid(x, 60.0, a, b, c)) ** 2).sum() * (1 + 1e-6)


def test_outliers_are_dropped_and_the_offset_is_where_the_curve_begins():
    x, y = noisy(4, ((10, 15.0),))
    fit = paper_fit(x, y + 2.0, 60.0, eps=2.0)
    assert not fit.used[10] and fit.a_post == pytest.approx(74, abs=0.7) and fit.eps == 2.0
    assert fit.curve([0.0])[0] == 62.0


def test_a_collapsed_curve_has_the_best_score_before_it_and_no_sigmoid():
    x, y = noisy(5)
    y[20:] = 40.0
    fit = paper_fit(x, y, 60.0)
    assert (
        fit.collapsed_at == x[20]
        and fit.a_post == y[:20].max()
        and (fit.b, fit.c_mid, fit.train_rmse) == (None, None, None)
    )
    np.testing.assert_array_equal(fit.curve([1.0, 100.0]), [fit.a_post] * 2)


def test_the_ceiling_ends_at_the_highest_possible_score():
    x = np.arange(1, 31) * 1.0
    y = 20 + 1.4 * x  # has not bent
    assert paper_fit(x, y, 20.0).a_post <= 100 and paper_fit(x, y, 20.0, max_score=80.0).a_post == pytest.approx(
        80, abs=1e-6
    )


@pytest.mark.parametrize(
    ("options", "says"),
    [({"tau": 0.0}, "tau"), ({"alpha": 0.4}, "alpha"), ({"eps": -1.0}, "eps"), ({"eps": 41.0}, "maximum")],
)
def test_options_out_of_range_are_refused(options, says):
    with pytest.raises(UserError, match=says):
        paper_fit(*noisy(0), 60.0, **options)


def test_three_points_are_too_few():
    with pytest.raises(UserError, match="4 points"):
        paper_fit([1, 2, 3], [60, 61, 62], 59)
