"""What a study answers, from runs made by hand: the numbers in the sentences, and what is called supported."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from pctrain.ceiling.correlation import correlate
from pctrain.report.answers import Answer, answers
from pctrain.report.study_data import RLPoint, RLRun, SFTLoss, SFTRun, SFTScore, Study, scored_run


def sft(
    name: str = "",
    seed: int = 0,
    minimum: float = 0.4,
    turned: bool = True,
    size: int | None = None,
    difficulty: str | None = None,
    validation: str = "v.jsonl",
    scores: bool = True,
) -> SFTRun:
    """Ten validations, the lowest at step 50 (or at the end), in whose regime RL starts from steps 20, 50 and 90."""
    losses = [
        minimum * (1 + (0.006 if turned and i > 5 else 0.02) * (i - (5 if turned else 9)) ** 2) for i in range(10)
    ]
    validations = [SFTLoss(10 * i, i * 1e-3, loss, 0.01, "stable") for i, loss in enumerate(losses)]
    readings = [SFTScore(10 * i, i * 1e-3, 20.0 + i, 2.0) for i in range(10)]
    config = {"data": {"validation": [{"path": validation}]}}
    return SFTRun(
        "sft",
        Path("sft"),
        config,
        "",
        {},
        set=name,
        seed=seed,
        losses=validations,
        scores=readings if scores else [],
        delta=0.02,
        delta2=0.10,
        size=size,
        difficulty=difficulty,
    )


def rl(
    last: float,
    step: int = 50,
    role: str = "stable",
    name: str = "",
    seed: int = 0,
    se: float = 1.0,
    algorithm: str = "grpo",
    ceiling: tuple | None = None,
    verdict: str = "identified",
) -> RLRun:
    fit = (
        None
        if ceiling is None
        else SimpleNamespace(a_post_low=ceiling[0], a_post=ceiling[1], a_post_high=ceiling[2], verdict=verdict)
    )
    points = [RLPoint(0, 0.0, 30.0, se), RLPoint(10, 0.01, last, se)]
    return scored_run(
        fit,
        points,
        name=f"rl-step-{step}",
        folder=Path("rl"),
        config={},
        config_text="",
        ledger={},
        set=name,
        seed=seed,
        start_step=step,
        role=role,
        algorithm=algorithm,
        eflops_sft=step * 1e-4,
        start_regime="stable",
    )


def asked(study: Study, beginning: str) -> Answer:
    [found] = [answer for answer in answers(study) if answer.question.startswith(beginning)]
    return found


def study(sft_runs: list[SFTRun], rl_runs: list[RLRun]) -> Study:
    return Study("s", Path("s"), sft_runs, rl_runs)


# ---- when to switch


def test_a_clear_lead_is_a_reason_to_switch_there():
    found = asked(study([sft()], [rl(60.0), rl(50.0, 90, "overfit"), rl(45.0, 20, "early")]), "When to switch")
    assert (
        found.supported
        and "the validation minimum (step 50, stable) ended highest" in found.text
        and "switch there" in found.text
    )
    half = 1.96 * 2**0.5
    assert found.evidence["lead"]["points"] == 10.0
    assert (found.evidence["lead"]["low"], found.evidence["lead"]["high"]) == pytest.approx(
        (10 - half, 10 + half), abs=0.01
    )


def test_a_lead_within_the_interval_is_not_told_apart():
    found = asked(study([sft()], [rl(60.0), rl(58.0, 90, "overfit")]), "When to switch")
    assert not found.supported and "not told apart" in found.text and "switch there" not in found.text


def test_over_seeds_the_interval_is_welchs():
    stable, early = [60.0, 62.0, 61.0], [50.0, 58.0, 51.0]
    runs = [rl(v, seed=i) for i, v in enumerate(stable)] + [rl(v, 20, "early", seed=i) for i, v in enumerate(early)]
    lead = asked(study([sft(seed=i) for i in range(3)], runs), "When to switch").evidence["lead"]
    interval = stats.ttest_ind(stable, early, equal_var=False).confidence_interval(0.95)
    assert (lead["low"], lead["high"]) == pytest.approx((interval.low, interval.high))


def test_whether_the_minimum_is_passed_is_said():
    passed = asked(study([sft()], [rl(60.0)]), "When to switch")
    assert "lowest at step 50 (0.400 nats a token)" in passed.text and passed.evidence["minimum_passed"] > 0.95
    falls = asked(study([sft(turned=False)], [rl(60.0, 90)]), "When to switch")
    assert (
        "not sure that the minimum is passed" in falls.text and not falls.supported and "from there alone" in falls.text
    )


# ---- what RL can still give


def test_what_is_left_is_the_ceiling_less_the_last_score():
    runs = [
        rl(60.0, ceiling=(61.0, 62.0, 64.5)),
        rl(50.0, 20, "early", ceiling=(55.0, 60.0, 80.0), verdict="lower_bound"),
        rl(40.0, 90),
    ]
    found = asked(study([sft()], runs), "What can RL")
    assert (
        found.supported
        and "ceiling of 62.0 % (90 % interval 61.0 to 64.5): more of it gives +2.0 points (+1.0 to +4.5)" in found.text
    )
    assert "at least 55.0 %" in found.text and "Nothing is said about 1 of 3 RL runs" in found.text
    bound = asked(study([sft()], runs[1:]), "What can RL")
    assert not bound.supported


# ---- sets

# Minimum validation loss and highest ceiling of the paper's five sets (PAPER.md 7).
PAPER = {
    "S1K": (0.51, 77.3),
    "Easy102K": (0.44, 78.8),
    "Uniform102K": (0.42, 79.7),
    "Hard102K": (0.40, 82.8),
    "SFT889K": (0.37, 84.0),
}


def of_sets(**more) -> Study:
    return study(
        [sft(name, minimum=loss, **more) for name, (loss, _) in PAPER.items()],
        [rl(top - 1, name=name, ceiling=(top - 1, top, top + 1)) for name, (_, top) in PAPER.items()],
    )


def test_the_papers_correlation_of_loss_and_ceiling():
    found = asked(of_sets(), "Which set first")
    assert found.text.startswith("SFT889K: its minimum validation loss is the lowest") and found.supported
    assert found.evidence["pearson"]["value"] == pytest.approx(-0.92, abs=0.005)
    assert found.evidence["spearman"]["value"] == pytest.approx(-1.0) and found.evidence["spearman"][
        "p"
    ] == pytest.approx(2 / 120)
    assert -1 <= found.evidence["pearson"]["low"] < -0.92 < found.evidence["pearson"]["high"] < 0
    assert "highest identified ceiling over 5 sets" in found.text


def test_few_sets_have_no_interval():
    full = of_sets()
    few = study(
        [run for run in full.sft if run.set in ("S1K", "SFT889K")],
        [run for run in full.rl if run.set in ("S1K", "SFT889K")],
    )
    found = asked(few, "Which set first")
    assert (
        not found.supported
        and found.evidence["pearson"]["high"] is None
        and "2 sets are too few for an interval" in found.text
    )


def test_losses_on_different_validation_sets_are_not_compared():
    runs = [sft("a", minimum=0.4), sft("b", minimum=0.3, validation="other.jsonl")]
    found = asked(study(runs, [rl(50, name="a"), rl(60, name="b")]), "Which set first")
    assert not found.supported and "not comparable" in found.text


def test_more_against_harder():
    sizes = {"small-easy": (1000, "easy", 50.0), "large-easy": (8000, "easy", 52.0), "small-hard": (1000, "hard", 62.0)}
    full = study(
        [sft(name, size=size, difficulty=kind) for name, (size, kind, _) in sizes.items()],
        [rl(end, name=name, se=0.8) for name, (_, _, end) in sizes.items()],
    )
    found = asked(full, "Is more data")
    assert found.supported and "harder data gave more here" in found.text
    assert [d["points"] for d in found.evidence["more"]] == [2.0] and [
        d["points"] for d in found.evidence["harder"]
    ] == [12.0]
    one = asked(study(full.sft[:2], full.rl[:2]), "Is more data")
    assert not one.supported and "what harder data gives was not tried" in one.text


def test_sets_of_unknown_size_do_not_tell():
    found = asked(of_sets(), "Is more data")
    assert not found.supported and found.text.startswith("Not told by these sets")


# ---- ways of training


def test_every_way_of_training_is_ranked():
    runs = [rl(40.0, 0, "none"), rl(60.0), rl(50.0, 0, "none", algorithm="luffy")]
    found = asked(study([sft()], runs), "Which way")
    assert found.supported and found.text.startswith("SFT then grpo from the validation minimum ended highest")
    assert list(found.evidence["scores"]) == [
        "SFT then grpo from the validation minimum",
        "luffy without SFT",
        "grpo without SFT",
        "SFT alone",
    ]


# ---- what is missing


def test_what_the_evidence_does_not_support_is_listed():
    found = asked(study([sft(scores=False)], [rl(60.0), rl(59.0, 20, "early")]), "What does the evidence not")
    for part in ("When to switch", "other seeds", "RL without SFT", "SFT alone", "there is one set"):
        assert part in found.text
    assert not any(answer.question.startswith(("Which", "Is more")) for answer in answers(study([sft()], [rl(60.0)])))


def test_a_study_of_nothing_is_answered_too():
    assert [answer.question for answer in answers(study([], []))] == ["What does the evidence not support?"]


# ---- correlations


def test_fishers_interval_covers_the_truth():
    """Normal pairs of correlation -0.8, six of them: the 95 % interval holds it in 93 to 97 % of the draws."""
    rng = np.random.default_rng(0)
    a = rng.standard_normal((1500, 6))
    b = -0.8 * a + 0.6 * rng.standard_normal(a.shape)
    found = [correlate(x, y, "pearson") for x, y in zip(a, b)]
    assert 0.93 < np.mean([c.low <= -0.8 <= c.high for c in found]) < 0.97


@given(st.lists(st.tuples(st.floats(-10, 10), st.floats(-10, 10)), min_size=4, max_size=7))
def test_correlations_are_scipys(points):
    x, y = zip(*points)
    if np.std(x) < 1e-6 or np.std(y) < 1e-6:
        return
    for kind, scipys in (("pearson", stats.pearsonr), ("spearman", stats.spearmanr)):
        found = correlate(x, y, kind)
        assert found.value == pytest.approx(scipys(x, y).statistic, abs=1e-6)
        assert -1 <= found.low <= found.value <= found.high <= 1 and 0 < found.p <= 1


def test_a_constant_has_no_correlation():
    assert correlate([1, 2, 3], [5, 5, 5], "pearson").value is None and "not defined" in str(
        correlate([1, 2], [5, 5], "spearman")
    )
