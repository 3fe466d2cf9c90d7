"""The SFT monitor on simulated noisy curves of known truth: it rarely stops too early, stops in time, does not flip."""

from itertools import pairwise

import numpy as np
import pytest

from pctrain.ceiling import regimes
from pctrain.ceiling.monitor import SURE, Monitor
from pctrain.common.errors import UserError

DELTA, DELTA2 = 0.02, 0.10
EACH = 150  # curves of each kind


def truth(kind: str, t: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """The noiseless loss at t in [0, 1]."""
    if kind == "falling":
        return 0.4 + 0.15 * np.exp(-t / rng.uniform(0.3, 1.5)) + 0.9 * np.exp(-t / 0.05)
    fall = 0.45 + 1.2 * np.exp(-t / rng.uniform(0.03, 0.12))
    turn = rng.uniform(0.15, 0.6)
    rise = {"plateau": 0.0, "shallow": 0.012, "overfit": rng.uniform(0.05, 0.6)}[
        kind
    ]  # shallow: it stays within the stable band
    return fall * (1 + rise * np.clip((t - turn) / (1 - turn), 0, None) ** rng.choice([1, 2]))


def noise(n: int, rng: np.random.Generator) -> np.ndarray:
    """Relative noise: sd 0.1 to 0.8%, AR(1) 0 to 0.6, with heavy tails in some of the curves."""
    rho = rng.choice([0, 0.3, 0.6])
    shocks = rng.standard_t(4, n) / np.sqrt(2) if rng.random() < 0.3 else rng.standard_normal(n)
    values = np.zeros(n)
    for i in range(n):
        values[i] = rho * values[i - 1] + np.sqrt(1 - rho**2) * shocks[i] if i else shocks[0]
    return rng.uniform(0.001, 0.008) * values


def simulate(kind: str, seed: int):
    """Return the index where the true loss leaves the stable band after its minimum, noisy losses, relative se."""
    rng = np.random.default_rng(seed)
    n = int(rng.integers(15, 60))
    loss = truth(kind, np.linspace(0, 1, n), rng)
    left = next((i for i in range(int(loss.argmin()), n) if loss[i] > (1 + DELTA) * loss.min()), None)
    return left, loss * np.exp(noise(n, rng)), rng.uniform(0.01, 0.04)


def watch(losses, share: float) -> list:
    monitor = Monitor(DELTA, DELTA2)
    return [monitor.add(i, float(i), float(loss), share * float(loss)) for i, loss in enumerate(losses)]


def naive_stop(losses) -> int | None:
    """Two validations in a row above the band of the minimum so far, ignoring noise."""
    above = [loss > (1 + DELTA) * min(losses[: i + 1]) for i, loss in enumerate(losses)]
    low = int(np.argmin(losses[:5])) if len(losses) > 4 else 0
    return next(
        (i for i in range(max(2, low), len(losses)) if above[i] and above[i - 1] and min(losses[:i]) < losses[0]), None
    )


@pytest.fixture(scope="module")
def watched():
    """{kind: [(index where the truth left the band, readings, losses)]}."""
    return {
        kind: [
            (left, watch(losses, share), losses)
            for left, losses, share in (simulate(kind, EACH * place + i) for i in range(EACH))
        ]
        for place, kind in enumerate(("falling", "plateau", "shallow", "overfit"))
    }


def first_stop(readings) -> int | None:
    return next((i for i, reading in enumerate(readings) if reading.has_left("stable")), None)


def false_stop(left: int | None, stop: int | None) -> bool:
    return stop is not None and (left is None or stop < left)


def test_false_stops_are_below_two_percent(watched):
    rates = {
        kind: np.mean([false_stop(left, first_stop(readings)) for left, readings, _ in curves])
        for kind, curves in watched.items()
    }
    assert np.mean(list(rates.values())) < 0.01 and max(rates.values()) < 0.02, rates
    # The curves are noisy enough to mislead a rule without a model.
    naive = [false_stop(left, naive_stop(losses)) for curves in watched.values() for left, _, losses in curves]
    assert np.mean(naive) > 0.05


def test_right_stops_come_in_time(watched):
    """One validation later is the earliest that two in a row allow."""
    late = [
        (first_stop(readings) or len(readings)) - left for left, readings, _ in watched["overfit"] if left is not None
    ]
    assert len(late) > 0.9 * EACH
    assert np.median(late) <= 2 and np.quantile(late, 0.95) <= 4
    in_time = [
        (left, readings) for left, readings, _ in watched["overfit"] if left is not None and left < len(readings) - 5
    ]
    stopped = [first_stop(readings) is not None for left, readings in in_time]
    assert np.mean(stopped) > 0.99


def test_the_word_does_not_flip(watched):
    for kind, most in (("falling", 0), ("plateau", 0), ("shallow", 0), ("overfit", 2)):
        changes = [sum(a.regime != b.regime for a, b in pairwise(readings)) for _, readings, _ in watched[kind]]
        assert np.quantile(changes, 0.98) <= most, kind


def test_confidence_comes_before_the_band_is_left(watched):
    """`keep` comes before `stop`, and hardly ever on a curve that falls."""
    for _, readings, _ in watched["overfit"]:
        advice = [reading.advice for reading in readings]
        if "stop" in advice and "keep" in advice:
            assert advice.index("keep") < advice.index("stop")
    kept = [any(reading.advice != "continue" for reading in readings) for _, readings, _ in watched["falling"]]
    assert np.mean(kept) < 0.05
    passed = [readings[-1].passed for left, readings, _ in watched["overfit"] if left is not None]
    assert np.mean(np.array(passed) > SURE) > 0.95


def test_confidence_is_calibrated():
    """Stated probabilities match frequencies over falling and overfitting curves, with AR noise and heavy tails."""
    stated, happened = [], []
    for place, kind in enumerate(("falling", "overfit", "shallow")):
        for i in range(EACH):
            rng = np.random.default_rng(10_000 + EACH * place + i)
            loss = truth(kind, np.linspace(0, 1, int(rng.integers(15, 60))), rng)
            readings = watch(loss * np.exp(noise(len(loss), rng)), rng.uniform(0.01, 0.04))
            stated += [reading.passed for reading in readings[8:]]
            happened += [loss[k] > loss[:k].min() for k in range(8, len(loss))]
    stated, happened = np.array(stated), np.array(happened)
    assert happened[stated >= 0.99].mean() > 0.98 and happened[(stated >= 0.95) & (stated < 0.99)].mean() > 0.85
    assert 0.4 < happened[(stated >= 0.5) & (stated < 0.8)].mean() < 0.7 and happened[stated < 0.05].mean() < 0.1


def test_rl_starts_from_the_best_checkpoint():
    monitor = Monitor(DELTA, DELTA2)
    losses = [2.0, 1.0, 0.6, 0.5, 0.52, 0.51, 0.56, 0.6]
    saved = [False, True, False, False, True, True, False, True]
    starts = [
        monitor.add(10 * i, i, loss, 0.01, checkpoint).start
        for i, (loss, checkpoint) in enumerate(zip(losses, saved, strict=True))
    ]
    assert starts == [None, 10, 10, 10, 40, 50, 50, 50]


def test_a_single_outlier_stops_nothing():
    losses = 0.5 + np.exp(-np.arange(20) / 2.0)
    losses[14] *= 1.15
    assert all(reading.regime == "stable" and reading.advice != "stop" for reading in watch(losses, 0.02))


@pytest.mark.parametrize("regime, at", [("stable", 0.51), ("mild", 0.55)])
def test_a_clean_curve_leaves_its_regimes_at_their_bounds(regime, at):
    losses = np.concatenate([0.5 + np.exp(-np.arange(12) / 1.5), np.linspace(0.5, 0.7, 21)[1:]])
    readings = watch(losses, 0.02)
    stop = next(i for i, reading in enumerate(readings) if reading.has_left(regime))
    assert losses[stop - 1] > at and losses[stop] < at + 0.04  # validations are 0.01 apart


@pytest.mark.parametrize(
    "step, eflops, loss, se",
    [
        (1, 1.0, float("nan"), 0.1),
        (1, 1.0, 0.0, 0.1),
        (1, 1.0, float("inf"), 0.1),
        (1, 0.0, 1.0, 0.1),
        (1, 1.0, 1.0, float("nan")),
    ],
)
def test_what_is_no_validation_is_refused(step, eflops, loss, se):
    monitor = Monitor(DELTA, DELTA2)
    monitor.add(0, 0.0, 2.0, 0.1)
    with pytest.raises(UserError, match="step 1"):
        monitor.add(step, eflops, loss, se)


# ---- the paper's curves, with the whole curve at hand

PUBLISHED = {
    "Easy102K": (
        [0, 19.8, 39.5, 59.3, 79.0, 98.8, 335.9],
        [0.71, 0.45, 0.44, 0.46, 0.47, 0.47, 0.87],
        ["adaptive", "stable", "stable", "mild", "mild", "mild", "severe"],
    ),
    "S1K": (
        [0, 0.6, 1.1, 1.7, 2.3, 2.9],
        [0.71, 0.52, 0.51, 0.53, 0.55, 0.56],
        ["adaptive", "stable", "stable", "mild", "mild", "mild"],
    ),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_papers_regime_is_among_those_that_its_digits_allow(name):
    """Each loss was read to two digits, so the truth is within 0.005. Try all ends of these intervals and middles."""
    x, losses, shaded = PUBLISHED[name]
    ends = np.stack(np.meshgrid(*[[-0.0049, 0.0, 0.0049]] * len(x)), -1).reshape(-1, len(x))
    classified = [regimes.classify(x, np.array(losses) + shift) for shift in ends]
    allowed = [set(column) for column in zip(*classified, strict=True)]
    assert all(regime in point for regime, point in zip(shaded, allowed, strict=True)), allowed
    assert shaded in classified  # all of them at once
    differs = [i for i, regime in enumerate(regimes.classify(x, losses)) if regime != shaded[i]]
    assert differs == ([1] if name == "Easy102K" else [])


def test_online_easy102k_is_stopped_when_severe_at_the_latest():
    x, losses, _ = PUBLISHED["Easy102K"]
    monitor = Monitor(DELTA, DELTA2)
    readings = [monitor.add(i, x[i], losses[i], 0.01) for i in range(7)]
    assert [reading.regime for reading in readings[:3]] == ["stable"] * 3 and readings[-1].advice == "stop"
    assert readings[-1].start == 2
