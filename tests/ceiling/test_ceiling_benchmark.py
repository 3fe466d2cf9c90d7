"""The ceiling benchmark: a quick run measures everything, checks can miss, and (full) the targets are met."""

import json

import numpy as np
import pytest

from benchmarks.ceilings import __main__ as benchmark
from benchmarks.ceilings import published, regimes, simulated
from benchmarks.ceilings.checks import Check

# The beginnings of the names of all checks.
NAMES = (
    "first 71%: median",
    "first 71%: mean",
    "first 71%: identified",
    "first 71%: worst identified",
    "all points: median",
    "all points: identified",
    "held-out RMSE, mean over curves: plain least squares",
    "held-out RMSE, mean over curves: mean of the last fifth",
    "held-out RMSE, mean over curves: log-linear",
    "held-out RMSE, mean over curves: method paper",
    "held-out points in the predictive 90% interval: pctrain",
    "A from all points inside the 71%",
    "collapse alarms before",
    "one fit with its interval",
    "90% interval covers A, pooled",
    "the same, identified",
    "the same, lower_bound",
    "the lowest of all regimes",
    "identified off by more than 2",
    "verdicts right",
    "range/C below 1",
)


def test_a_quick_run_prints_and_writes_every_check(tmp_path, capsys):
    status = benchmark.main(["--quick", "--out", str(tmp_path / "checks.json")])
    checks = json.loads((tmp_path / "checks.json").read_text())
    printed = capsys.readouterr().out
    for name in NAMES:
        assert any(check["name"].startswith(name) for check in checks), name
    for name in (
        "range/C 1.0",
        "AR 0.6",
        "noise 0.8",
        "points 20",
        "tails heavy",
        "median width",
        "better on",
        "targets met",
    ):
        assert name in printed
    assert status == int(any(check["passed"] is False for check in checks))
    by_name = {check["name"]: check for check in checks}
    # The published curves are the same in a quick run: these numbers are final.
    assert (
        by_name["first 71%: median distance to published"]["value"] <= 0.7
        and by_name["first 71%: worst identified"]["value"] <= 2
    )


def test_a_check_is_met_missed_or_without_a_target():
    assert [Check("x", value, 0.86, 0.94).passed for value in (0.85, 0.86, 0.94, 0.95, np.nan)] == [
        False,
        True,
        True,
        False,
        None,
    ]
    assert Check("x", 3.0).passed is None and Check("x", 3.0, high=2.0).passed is False


def outcome(**changes):
    truth = simulated.Truth((0, 0), 3.0, 0.0, 0.5, 40, "normal")
    values = {
        "truth": truth,
        "a": 70.0,
        "gain": 5.0,
        "a_post": 70.5,
        "low": 69.0,
        "high": 72.0,
        "verdict": "identified",
    }
    return simulated.Outcome(**values | changes)


def test_verdicts_are_judged_by_the_truth():
    assert outcome().right and outcome().covered and outcome().error == 0.5
    assert not outcome(a_post=71.6).right  # identified: within 1.5
    assert outcome(verdict="lower_bound", a=80.0).right and not outcome(verdict="lower_bound", a=68.0).right
    assert outcome(verdict="flat", gain=1.5).right and not outcome(verdict="flat", gain=1.6).right
    assert not outcome(verdict="collapsed").right


def test_coverage_is_that_of_each_verdict_in_each_regime():
    heavy = simulated.Truth((0, 1), 3.0, 0.0, 0.5, 40, "heavy")
    seen = (
        [outcome() for _ in range(90)]
        + [outcome(truth=heavy, high=69.5) for _ in range(60)]
        + [outcome(verdict="lower_bound")]
    )
    by_name = {
        check.name: check for check in regimes.checks(seen, [outcome(low=71.0)], [outcome(verdict="flat", gain=0.0)])
    }
    assert by_name["90% interval covers A, pooled"].value == pytest.approx(91 / 151)
    lowest = [check for check in regimes.checks(seen, seen, seen) if check.note.startswith("tails heavy")]
    assert [check.value for check in lowest] == [0.0, 0.0] and not any(check.passed for check in lowest)
    assert (
        by_name["range/C below 1: lower end below A"].value == 0
        and by_name["verdicts right where there is no gain"].value == 1
    )


def test_simulated_curves_are_the_same_every_time_and_what_they_say_they_are():
    truths = simulated.truths((3.0, 30.0), 72, seed=7)
    assert len({truth.seed for truth in truths}) == 144 == len(truths)
    for ar in simulated.AR:
        assert sum(truth.ar == ar for truth in truths) == 36
    x, scores, _, a, gain = truths[0].curve()
    np.testing.assert_array_equal(scores, truths[0].curve()[1])
    assert len(x) == truths[0].points and a > scores[0] and 2 <= gain <= 14
    big = simulated.Truth((1,), 3.0, 0.6, 0.5, 4000, "heavy")
    noise = big._errors(np.random.default_rng(0))
    assert np.std(noise) == pytest.approx(0.5, rel=0.15) and np.corrcoef(noise[1:], noise[:-1])[0, 1] == pytest.approx(
        0.6, abs=0.06
    )


def test_an_alarm_before_a_collapse_is_counted():
    case = published.case_of(published.read(published.FILE)[0])
    assert case.collapse is not None and published.early_alarms(case) == 0
    case.curve.scores[20:26] = 60.0  # falls, and comes back
    assert published.early_alarms(case) > 0


@pytest.mark.full
@pytest.mark.timeout(3600)
def test_the_targets_are_met(tmp_path):
    benchmark.main(["--out", str(tmp_path / "checks.json")])
    missed = {check["name"] for check in json.loads((tmp_path / "checks.json").read_text()) if check["passed"] is False}
    assert not missed
