"""The answers of a study: when to switch, what RL can still give, which data to buy, with the numbers behind each one.

Scores are in percent, differences in points. Intervals of scores and of their differences are 95% intervals
(ceiling/stats.py): Welch's over seeds if there are two or more; with one seed, from the binomial error of the test
problems, which does not know what another seed would change. Intervals of ceilings are the 90% intervals of the fit. An
answer is `supported` if the interval of its claim excludes zero; otherwise its text says what is missing.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from pctrain.ceiling.monitor import SURE, Monitor
from pctrain.ceiling.stats import Measured, difference, mean_over_seeds
from pctrain.report.answer import INDISTINGUISHABLE, Answer, difference_json, final_score, grouped, score_json, start_of
from pctrain.report.looks import flops_text
from pctrain.report.set_answers import more_or_harder, which_set_first
from pctrain.report.study_data import FittedRun, ScoredRun, SFTRun, Study
from pctrain.report.wording import EXCLUDES_ZERO, ceiling, listed, percent, points, probability

ONE_SEED = "one seed was run, so the intervals cover the test problems only"


def answers(study: Study) -> list[Answer]:
    """Return the answers in the order of a reader's questions, without those the study has no data for."""
    given = [*_when_to_switch(study), *_what_is_left(study), *_which_way(study)]
    if len({run.set for run in study.sft}) > 1:
        given += [more_or_harder(study), which_set_first(study)]
    return [*given, _not_supported(study, given)]


# ---- when to switch


def _when_to_switch(study: Study) -> list[Answer]:
    """Return one answer for each set and algorithm that ran RL from SFT checkpoints."""
    after_sft = [run for run in study.scored if run.start_step]
    groups = grouped(after_sft, lambda run: (run.set, run.algorithm))
    return [_switch(study, name, algorithm, runs) for (name, algorithm), runs in groups.items()]


def _switch(study: Study, name: str, algorithm: str, runs: Sequence[ScoredRun]) -> Answer:
    question = f"When to switch from SFT to RL{_on(name)}?"
    if len({run.algorithm for run in study.rl if run.start_step}) > 1:
        question = f"When to switch from SFT to RL{_on(name)}, with {algorithm}?"
    starts = grouped(runs, start_of)
    ends = {start: final_score(of_start) for start, of_start in starts.items()}
    steps = {start: sorted({run.start_step for run in of_start}) for start, of_start in starts.items()}
    ranked = _highest_first(ends)
    best = ranked[0]
    minimum, sentence = _minimum(study, name)
    evidence: dict[str, Any] = {
        "set": name,
        "algorithm": algorithm,
        "ends": {start: score_json(ends[start]) for start in ranked},
        "steps": steps,
        "minimum_passed": minimum,
    }
    place = _start_text(best, steps[best], starts[best][0].start_regime)
    if len(ranked) == 1:
        text = (
            f"{sentence} RL was started only from {place} and ended at {percent(ends[best])}. "
            "No other start was tried, so this study cannot say whether another would end higher or lower."
        )
        return Answer(question, text.strip(), evidence)
    lead = difference(ends[best], ends[ranked[1]])
    evidence["lead"] = difference_json(lead)
    text = (
        f"{sentence} RL from {place} ended highest, at {percent(ends[best])}. "
        f"Its lead over RL from {_named(ranked[1])} is {points(lead)}. "
    )
    text += f"The interval excludes zero: start RL from {_named(best)}." if lead.excludes_zero else INDISTINGUISHABLE
    return Answer(question, text.strip(), evidence, lead.excludes_zero)


def _minimum(study: Study, name: str) -> tuple[float | None, str]:
    """Return how probable it is that SFT on a set has passed the minimum of its loss, and a sentence on it.

    With several seeds it is the lowest of their probabilities.
    """
    runs = [run for run in study.sft if run.set == name and run.best]
    best = [run.best for run in runs if run.best]
    if not best:
        return None, ""
    passed = min(minimum_passed(run) for run in runs)
    steps = _steps(sorted({point.step for point in best}))
    loss = math.fsum(point.val_loss for point in best) / len(best)
    lowest = f"The validation loss was lowest at {steps} ({loss:.3f} nats per token)"
    if passed >= SURE:
        return passed, f"{lowest}, and SFT has passed this minimum (probability {probability(passed)})."
    return passed, (
        f"{lowest}, but it is uncertain whether SFT has passed the minimum (probability {probability(passed)}): "
        "more SFT may move it."
    )


def minimum_passed(run: SFTRun) -> float:
    """Return the monitor's probability, after the last validation, that SFT has passed the minimum of its loss."""
    monitor, passed = Monitor(run.delta, run.delta2), 0.0
    for point in run.losses:
        passed = monitor.add(point.step, point.eflops_sft, point.val_loss, point.val_loss_se).passed
    return passed


# ---- what RL can still give


def _what_is_left(study: Study) -> list[Answer]:
    if not study.rl:
        return []
    rows = [
        {
            "run": run.name,
            "verdict": run.fit.verdict,
            "last": run.last.score,
            "ceiling": [run.fit.a_post_low, run.fit.a_post, run.fit.a_post_high],
        }
        for run in study.fitted
    ]
    sentences = [sentence for run in study.fitted if (sentence := _left_for(run))]
    silent = len(study.rl) - len(sentences)
    if silent:
        runs = "RL run" if len(study.rl) == 1 else "RL runs"
        sentences.append(
            f"Nothing can be said about {silent} of {len(study.rl)} {runs}: "
            "too few scores, or no rise in the score yet."
        )
    supported = any(run.fit.verdict == "identified" for run in study.fitted)
    return [Answer("What can RL still give?", " ".join(sentences), {"fits": rows}, supported)]


def _left_for(run: FittedRun) -> str:
    """Return a sentence on what more RL can give, "" if the fit does not say."""
    fit, last = run.fit, run.last.score
    if fit.verdict == "identified":
        return (
            f"RL from {run.label} has a ceiling of {ceiling(fit)}. Its last score is {last:.1f}%, so more RL can add "
            f"{fit.a_post - last:+.1f} points ({fit.a_post_low - last:+.1f} to {fit.a_post_high - last:+.1f})."
        )
    if fit.verdict == "lower_bound":
        return (
            f"RL from {run.label} is still rising. Its ceiling is at least {fit.a_post_low:.1f}% (95% probability); "
            "how much higher is unknown."
        )
    if fit.verdict == "collapsed":
        return f"RL from {run.label} collapsed. Before that it was heading for {ceiling(fit)}."
    return ""


# ---- which way of training


def _which_way(study: Study) -> list[Answer]:
    """Compare SFT alone, RL alone, one after the other and both at once by the last score, each at its own compute."""
    ways: dict[str, list[Measured]] = {}
    spent: dict[str, list[float]] = {}
    for sft in study.sft:
        if sft.scores:
            last = sft.scores[-1]
            way = f"SFT alone{_on(sft.set)}"
            ways.setdefault(way, []).append(Measured(last.score, last.score_se))
            spent.setdefault(way, []).append(last.eflops_sft)
    for run in study.scored:
        way = _way(run)
        ways.setdefault(way, []).append(run.last.measured)
        spent.setdefault(way, []).append(run.eflops_total)
    if not any(run.start_step == 0 for run in study.rl) or len(ways) < 2:
        return []
    scores = {way: mean_over_seeds(readings) for way, readings in ways.items()}
    totals = {way: math.fsum(values) / len(values) for way, values in spent.items()}
    first, second, *_ = ranked = _highest_first(scores)
    lead = difference(scores[first], scores[second])
    order = ", ".join(f"{way} {scores[way].value:.1f}%" for way in ranked)
    least, most = flops_text(min(totals.values())), flops_text(max(totals.values()))
    text = (
        f"{first} ended highest, at {percent(scores[first])}. Its lead over {second} is {points(lead)}. "
        f"{EXCLUDES_ZERO if lead.excludes_zero else INDISTINGUISHABLE} In order: {order}. "
        f"Each way is scored at its own compute, from {least} to {most}."
    )
    evidence = {
        "scores": {way: score_json(scores[way]) for way in ranked},
        "eflops": totals,
        "lead": difference_json(lead),
    }
    return [Answer("Which way of training ends highest?", text, evidence, lead.excludes_zero)]


def _way(run: ScoredRun) -> str:
    if not run.start_step:
        return f"{run.algorithm} without SFT"
    return f"SFT{_on(run.set)} then {run.algorithm} from {_named(start_of(run))}"


# ---- what is not supported


def _not_supported(study: Study, given: Sequence[Answer]) -> Answer:
    unsupported = [f"“{answer.question}”" for answer in given if not answer.supported]
    unknown = _unknown(study)
    sentences = []
    if unsupported:
        answers_to = "answers to" if len(unsupported) > 1 else "answer to"
        sentences.append(f"The evidence does not support the {answers_to} {listed(unsupported, 'or')}.")
    if unknown:
        sentences.append(f"{'It' if unsupported else 'The evidence'} says nothing about {listed(unknown, 'or')}.")
    missing = [*(f"the answer to {question}" for question in unsupported), *unknown]
    text = " ".join(sentences) or "Every answer above is supported by its interval."
    return Answer("What does the evidence not support?", text, {"not_supported": missing}, True)


def _unknown(study: Study) -> list[str]:
    """Return what the study did not try."""
    unknown = []
    if len({run.seed for run in study.runs}) == 1:
        unknown.append(f"other seeds ({ONE_SEED})")
    if not any(run.start_step == 0 for run in study.rl):
        unknown.append("RL without SFT (it was not run)")
    if not any(run.scores for run in study.sft):
        unknown.append("SFT alone (it was not scored)")
    if len({run.set for run in study.sft}) < 2:
        unknown.append("other data (there is one set)")
    return unknown


# ---- words and groups


def _highest_first(scores: dict[str, Measured]) -> list[str]:
    return sorted(scores, key=lambda name: -scores[name].value)


def _on(name: str) -> str:
    return f" on {name}" if name else ""


def _steps(steps: Sequence[int]) -> str:
    return f"step{'s' if len(steps) > 1 else ''} {' and '.join(map(str, steps))}"


def _named(start: str) -> str:
    names = {
        "early": "the early checkpoint",
        "stable": "the validation minimum",
        "overfit": "the overfit checkpoint",
    }
    return names.get(start, start)


def _start_text(start: str, steps: Sequence[int], regime: str | None) -> str:
    """Return a start with its steps and regime: "the overfit checkpoint (step 1740, severe regime)"."""
    parts = [] if _named(start) == start else [_steps(steps)]
    if regime:
        parts.append(f"{regime} regime")
    return f"{_named(start)} ({', '.join(parts)})" if parts else _named(start)
