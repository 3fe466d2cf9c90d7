"""The answers of a study, from runs made by hand: the numbers in the sentences, and which answers are supported."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from pctrain.ceiling.correlation import correlate
from pctrain.ceiling.stats import Measured, contrast, difference
from pctrain.report.answer import Answer
from pctrain.report.answers import answers
from pctrain.report.findings import findings, gain_of, headline
from pctrain.report.not_shown import not_shown
from pctrain.report.study_data import RLPoint, RLRun, ScoredRun, SFTLoss, SFTRun, SFTScore, Study, scored_run


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
    """An SFT run with ten validations. The loss is lowest at step 50 or, if it has not turned, at the end."""
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


def answer_to(study: Study, beginning: str) -> Answer:
    """Return the answer to the question that starts with `beginning`."""
    [answer] = [answer for answer in answers(study) if answer.question.startswith(beginning)]
    return answer


def study(sft_runs: list[SFTRun], rl_runs: list[RLRun]) -> Study:
    return Study("s", Path("s"), sft_runs, rl_runs)


# ---- when to switch


def test_a_clear_lead_is_a_reason_to_start_there():
    runs = [rl(60.0), rl(50.0, 90, "overfit"), rl(45.0, 20, "early")]
    answer = answer_to(study([sft()], runs), "When to switch")
    assert answer.supported
    assert "the validation minimum (step 50, stable regime) ended highest" in answer.text
    assert "The interval excludes zero: start RL from the validation minimum." in answer.text
    half = 1.96 * 2**0.5
    lead = answer.evidence["lead"]
    assert lead["points"] == 10.0
    assert (lead["low"], lead["high"]) == pytest.approx((10 - half, 10 + half), abs=0.01)


def test_a_lead_whose_interval_includes_zero_is_indistinguishable():
    answer = answer_to(study([sft()], [rl(60.0), rl(58.0, 90, "overfit")]), "When to switch")
    assert not answer.supported
    assert "statistically indistinguishable" in answer.text
    assert "start RL from" not in answer.text


@pytest.mark.parametrize(
    ("lead", "distinguishable"), [(1.90, False), (1.95, False), (1.97, True), (1.98, True), (2.05, True)]
)
def test_headline_findings_and_answer_have_one_criterion(lead: float, distinguishable: bool):
    """`lead` is in standard errors. At 1.98 the headline and the answer once contradicted each other."""
    points = lead * 2**0.5
    runs = study([sft()], [rl(60.0 + points), rl(60.0, 90, "overfit")])
    answer = answer_to(runs, "When to switch")
    shown, missing = " ".join(findings(runs)), " ".join(not_shown(runs))
    best_start = next(sentence for sentence in findings(runs) if "has the highest last score" in sentence)
    assert answer.supported is distinguishable
    for text in (headline(runs), best_start, answer.text):
        assert ("The interval excludes zero" in text) is distinguishable
        assert ("statistically indistinguishable" in text) is not distinguishable
    assert ("is statistically indistinguishable from RL from step 50" in missing) is not distinguishable
    assert "standard error" not in shown


@pytest.mark.parametrize(("gain", "distinguishable"), [(1.95, False), (1.98, True)])
def test_a_gain_has_the_same_criterion(gain: float, distinguishable: bool):
    run = rl(30.0 + gain * 2**0.5)
    assert isinstance(run, ScoredRun)
    assert gain_of(run).excludes_zero is distinguishable
    [sentence] = [sentence for sentence in findings(study([], [run])) if "took the score" in sentence]
    assert ("excludes zero" in sentence) is distinguishable
    assert ("indistinguishable from no change" in sentence) is not distinguishable


def test_over_seeds_the_interval_is_welchs():
    stable, early = [60.0, 62.0, 61.0], [50.0, 58.0, 51.0]
    runs = [rl(v, seed=i) for i, v in enumerate(stable)] + [rl(v, 20, "early", seed=i) for i, v in enumerate(early)]
    lead = answer_to(study([sft(seed=i) for i in range(3)], runs), "When to switch").evidence["lead"]
    interval = stats.ttest_ind(stable, early, equal_var=False).confidence_interval(0.95)
    assert (lead["low"], lead["high"]) == pytest.approx((interval.low, interval.high))


def test_the_answer_says_whether_the_minimum_is_passed():
    passed = answer_to(study([sft()], [rl(60.0)]), "When to switch")
    assert "lowest at step 50 (0.400 nats per token), and SFT has passed this minimum" in passed.text
    assert passed.evidence["minimum_passed"] > 0.95
    falls = answer_to(study([sft(turned=False)], [rl(60.0, 90)]), "When to switch")
    assert "uncertain whether SFT has passed the minimum" in falls.text
    assert "started only from" in falls.text
    assert not falls.supported


# ---- what RL can still give


def test_what_is_left_is_the_ceiling_less_the_last_score():
    runs = [
        rl(60.0, ceiling=(61.0, 62.0, 64.5)),
        rl(50.0, 20, "early", ceiling=(55.0, 60.0, 80.0), verdict="lower_bound"),
        rl(40.0, 90),
    ]
    answer = answer_to(study([sft()], runs), "What can RL")
    assert answer.supported
    assert "has a ceiling of 62.0% (90% interval 61.0 to 64.5)" in answer.text
    assert "so more RL can add +2.0 points (+1.0 to +4.5)" in answer.text
    assert "at least 55.0%" in answer.text
    assert "Nothing can be said about 1 of 3 RL runs" in answer.text
    bound = answer_to(study([sft()], runs[1:]), "What can RL")
    assert not bound.supported


# ---- sets

# Minimum validation loss and highest ceiling of the five sets of arXiv 2512.11470.
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
    answer = answer_to(of_sets(), "Which set first")
    assert answer.supported
    assert answer.text.startswith("SFT889K: it has the lowest minimum validation loss")
    pearson, spearman = answer.evidence["pearson"], answer.evidence["spearman"]
    assert pearson["value"] == pytest.approx(-0.92, abs=0.005)
    assert spearman["value"] == pytest.approx(-1.0)
    assert spearman["p"] == pytest.approx(2 / 120)
    assert -1 <= pearson["low"] < -0.92 < pearson["high"] < 0
    assert "Over 5 sets, the correlation of the loss with the highest identified ceiling" in answer.text


def test_few_sets_have_no_interval():
    full = of_sets()
    few = study(
        [run for run in full.sft if run.set in ("S1K", "SFT889K")],
        [run for run in full.rl if run.set in ("S1K", "SFT889K")],
    )
    answer = answer_to(few, "Which set first")
    assert not answer.supported
    assert answer.evidence["pearson"]["high"] is None
    assert "2 sets are too few for an interval" in answer.text


def test_losses_on_different_validation_sets_are_not_compared():
    runs = [sft("a", minimum=0.4), sft("b", minimum=0.3, validation="other.jsonl")]
    answer = answer_to(study(runs, [rl(50, name="a"), rl(60, name="b")]), "Which set first")
    assert not answer.supported
    assert "not comparable" in answer.text


def test_more_against_harder():
    sizes = {"small-easy": (1000, "easy", 50.0), "large-easy": (8000, "easy", 52.0), "small-hard": (1000, "hard", 62.0)}
    full = study(
        [sft(name, size=size, difficulty=kind) for name, (size, kind, _) in sizes.items()],
        [rl(end, name=name, se=0.8) for name, (_, _, end) in sizes.items()],
    )
    answer = answer_to(full, "Is more data")
    assert answer.supported
    assert "harder data is worth more here" in answer.text
    assert [d["points"] for d in answer.evidence["more"]] == [2.0]
    assert [d["points"] for d in answer.evidence["harder"]] == [12.0]
    alone = answer_to(study(full.sft[:2], full.rl[:2]), "Is more data")
    assert not alone.supported
    assert "Harder data was not tried" in alone.text


def test_a_set_in_both_pairs_counts_once():
    """The small easy set cancels: harder minus more is the hard set minus the large one."""
    sizes = {"small-easy": (1000, "easy", 50.0), "large-easy": (8000, "easy", 52.0), "small-hard": (1000, "hard", 54.5)}
    full = study(
        [sft(name, size=size, difficulty=kind) for name, (size, kind, _) in sizes.items()],
        [rl(end, name=name, se=0.8) for name, (_, _, end) in sizes.items()],
    )
    answer = answer_to(full, "Is more data")
    expected = difference(Measured(54.5, 0.8), Measured(52.0, 0.8))
    advantage = answer.evidence["harder_minus_more"]
    assert (advantage["points"], advantage["low"], advantage["high"]) == pytest.approx(
        (expected.value, expected.low, expected.high)
    )
    assert answer.supported is expected.excludes_zero is True


def test_sets_of_unknown_size_do_not_tell():
    answer = answer_to(of_sets(), "Is more data")
    assert not answer.supported
    assert answer.text.startswith("These sets cannot answer this")


# ---- ways of training


def test_every_way_of_training_is_ranked():
    runs = [rl(40.0, 0, "none"), rl(60.0), rl(50.0, 0, "none", algorithm="luffy")]
    answer = answer_to(study([sft()], runs), "Which way")
    assert answer.supported
    assert answer.text.startswith("SFT then grpo from the validation minimum ended highest")
    assert list(answer.evidence["scores"]) == [
        "SFT then grpo from the validation minimum",
        "luffy without SFT",
        "grpo without SFT",
        "SFT alone",
    ]


# ---- what is missing


def test_what_the_evidence_does_not_support_is_listed():
    answer = answer_to(study([sft(scores=False)], [rl(60.0), rl(59.0, 20, "early")]), "What does the evidence not")
    for part in ("When to switch", "other seeds", "RL without SFT", "SFT alone", "there is one set"):
        assert part in answer.text
    assert not any(answer.question.startswith(("Which", "Is more")) for answer in answers(study([sft()], [rl(60.0)])))


def test_a_study_of_nothing_is_answered_too():
    assert [answer.question for answer in answers(study([], []))] == ["What does the evidence not support?"]


# ---- statistics


@given(st.lists(st.tuples(st.floats(-5, 5), st.floats(0, 100), st.floats(0.01, 10)), min_size=1, max_size=5))
def test_a_contrast_adds_values_and_variances(terms):
    total = contrast([(weight, Measured(value, se)) for weight, value, se in terms])
    assert total.value == pytest.approx(sum(weight * value for weight, value, _ in terms), abs=1e-9)
    assert total.se**2 == pytest.approx(sum((weight * se) ** 2 for weight, _, se in terms), abs=1e-9)
    assert total.high - total.value == pytest.approx(1.959964 * total.se, abs=1e-5)


# ---- correlations


def test_fishers_interval_covers_the_truth():
    """Six normal pairs with correlation -0.8: the 95% interval contains it in 93 to 97% of the draws."""
    rng = np.random.default_rng(0)
    a = rng.standard_normal((1500, 6))
    b = -0.8 * a + 0.6 * rng.standard_normal(a.shape)
    correlations = [correlate(x, y, "pearson") for x, y in zip(a, b, strict=True)]
    assert 0.93 < np.mean([c.low <= -0.8 <= c.high for c in correlations]) < 0.97


@given(st.lists(st.tuples(st.floats(-10, 10), st.floats(-10, 10)), min_size=4, max_size=7))
def test_correlations_are_scipys(points):
    x, y = zip(*points, strict=True)
    if np.std(x) < 1e-6 or np.std(y) < 1e-6:
        return
    for kind, scipys in (("pearson", stats.pearsonr), ("spearman", stats.spearmanr)):
        correlation = correlate(x, y, kind)
        assert correlation.value == pytest.approx(scipys(x, y).statistic, abs=1e-6)
        assert -1 <= correlation.low <= correlation.value <= correlation.high <= 1
        assert 0 < correlation.p <= 1


def test_a_constant_has_no_correlation():
    assert correlate([1, 2, 3], [5, 5, 5], "pearson").value is None
    assert "not defined" in str(correlate([1, 2], [5, 5], "spearman"))
