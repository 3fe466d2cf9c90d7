"""The answers of a study with several trajectory sets: is more or harder data worth more, and which set comes first."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pctrain.ceiling.correlation import Correlation, correlate
from pctrain.ceiling.stats import Measured, contrast, difference
from pctrain.report.answer import INDISTINGUISHABLE, Answer, difference_json, final_score, grouped, score_json, start_of
from pctrain.report.study_data import FittedRun, ScoredRun, SFTRun, Study
from pctrain.report.wording import PAPER, percent, points, signed_points

ONE_SIZE = 0.1  # sets whose sizes differ by less than this share count as equally large
DIFFICULTIES = ("easy", "uniform", "hard")  # in increasing order


@dataclass(frozen=True)
class SetResult:
    """The results on a set, as means over seeds; None if there is no such run.

    `loss` is the minimum validation loss, `end` the highest last score of RL, `ceiling` its highest identified ceiling.
    """

    name: str
    size: int | None
    difficulty: str | None
    loss: float | None
    end: Measured | None
    ceiling: float | None


@dataclass(frozen=True)
class SizedSet:
    """A set of known size and difficulty that RL was run on; `end` is its highest last score."""

    name: str
    size: int
    difficulty: str
    end: Measured


@dataclass(frozen=True)
class Pair:
    """Two sets that differ only in size, or only in difficulty: the larger or harder one, and the other."""

    upper: SizedSet
    lower: SizedSet

    @property
    def gain(self) -> Measured:
        """How much higher RL ends on the upper set, in points."""
        return difference(self.upper.end, self.lower.end)

    def __str__(self) -> str:
        return f"{_described(self.upper)} against {_described(self.lower)}, {signed_points(self.gain)}"


def _results(study: Study) -> list[SetResult]:
    sets = grouped(study.sft, lambda run: run.set)
    return [_result(name, runs, [run for run in study.scored if run.set == name]) for name, runs in sets.items()]


def _result(name: str, sft: Sequence[SFTRun], rl: Sequence[ScoredRun]) -> SetResult:
    losses = [run.best.val_loss for run in sft if run.best]
    ways = list(grouped(rl, lambda run: (run.algorithm, start_of(run))).values())
    ends = [final_score(runs) for runs in ways]
    ceilings = [height for runs in ways if (height := _identified_ceiling(runs)) is not None]
    return SetResult(
        name,
        sft[0].size,
        sft[0].difficulty,
        math.fsum(losses) / len(losses) if losses else None,
        max(ends, key=lambda end: end.value, default=None),
        max(ceilings, default=None),
    )


def _identified_ceiling(runs: Sequence[ScoredRun]) -> float | None:
    """Return the mean ceiling over seeds, or None if it is not identified for all of them."""
    fits = [run.fit for run in runs if isinstance(run, FittedRun) and run.fit.verdict == "identified"]
    return math.fsum(fit.a_post for fit in fits) / len(fits) if len(fits) == len(runs) else None


def more_or_harder(study: Study) -> Answer:
    """Compare sets of one difficulty and different sizes with sets of one size and different difficulties."""
    question = "Is more data, or harder data, worth more?"
    ended = [(result, result.end) for result in _results(study) if result.end]
    sets = [{"set": r.name, "size": r.size, "difficulty": r.difficulty, "end": score_json(end)} for r, end in ended]
    evidence: dict[str, Any] = {"sets": sets}
    more, harder = _pairs(_sized_sets(ended))
    if not more and not harder:
        return Answer(question, _no_pairs(ended), evidence)
    evidence |= {
        "more": [difference_json(pair.gain) for pair in more],
        "harder": [difference_json(pair.gain) for pair in harder],
    }
    text = " ".join([*(f"More data: {pair}." for pair in more), *(f"Harder data: {pair}." for pair in harder)])
    if not more or not harder:
        return Answer(question, f"{text} {'More' if harder else 'Harder'} data was not tried.", evidence)
    advantage = _advantage(max(harder, key=_gain_of), max(more, key=_gain_of))
    evidence["harder_minus_more"] = difference_json(advantage)
    return Answer(question, f"{text} {_advantage_text(advantage)}", evidence, advantage.excludes_zero)


def _no_pairs(ended: Sequence[tuple[SetResult, Measured]]) -> str:
    """Return what it takes to compare more data with harder data, and the scores there are."""
    best_first = sorted(ended, key=lambda entry: -entry[1].value)
    ends = "; ".join(f"{_described(result)} {percent(end)}" for result, end in best_first) or "none"
    return (
        "These sets cannot answer this. It takes sets of one difficulty and several sizes, and sets of one size "
        "and several difficulties. Both must be known: `pctrain data select` records the difficulty. "
        f"Highest last scores: {ends}."
    )


def _advantage_text(advantage: Measured) -> str:
    winner, other = ("harder", "more") if advantage.value > 0 else ("more", "harder")
    lead = Measured(abs(advantage.value), advantage.se, advantage.freedom)
    verdict = INDISTINGUISHABLE
    if lead.excludes_zero:
        verdict = f"The interval excludes zero: {winner} data is worth more here."
    return f"The lead of {winner} data over {other} data is {points(lead)}. {verdict}"


def _sized_sets(ended: Sequence[tuple[SetResult, Measured]]) -> list[SizedSet]:
    return [SizedSet(r.name, r.size, r.difficulty, end) for r, end in ended if r.size and r.difficulty in DIFFICULTIES]


def _pairs(sets: Sequence[SizedSet]) -> tuple[list[Pair], list[Pair]]:
    """Return the pairs that differ in size only, and those that differ in difficulty only."""
    more: list[Pair] = []
    harder: list[Pair] = []
    for i, a in enumerate(sets):
        for b in sets[i + 1 :]:
            small, large = sorted((a, b), key=lambda s: s.size)
            easy, hard = sorted((a, b), key=lambda s: DIFFICULTIES.index(s.difficulty))
            equally_large = large.size <= (1 + ONE_SIZE) * small.size
            if a.difficulty == b.difficulty and not equally_large:
                more.append(Pair(large, small))
            elif a.difficulty != b.difficulty and equally_large:
                harder.append(Pair(hard, easy))
    return more, harder


def _gain_of(pair: Pair) -> float:
    return pair.gain.value


def _advantage(harder: Pair, more: Pair) -> Measured:
    """Return the gain of harder data minus that of more data.

    The two gains are not independent if a set is in both pairs, so each set counts once, with its total weight.
    """
    weights: dict[str, float] = {}
    ends: dict[str, Measured] = {}
    for sign, pair in ((1.0, harder), (-1.0, more)):
        for weight, one_set in ((sign, pair.upper), (-sign, pair.lower)):
            weights[one_set.name] = weights.get(one_set.name, 0.0) + weight
            ends[one_set.name] = one_set.end
    return contrast([(weight, ends[name]) for name, weight in weights.items() if weight])


def _described(result: SetResult | SizedSet) -> str:
    """Return the name of a set with its size and difficulty, if known."""
    size = f"{result.size} trajectories" if result.size else ""
    parts = [part for part in (size, result.difficulty) if part]
    return f"{result.name} ({', '.join(parts)})" if parts else result.name


def which_set_first(study: Study) -> Answer:
    """Name the set with the lowest validation loss, and test whether the loss predicts how high RL gets."""
    question = "Which set first?"
    results = _results(study)
    ranked = sorted(((r, r.loss) for r in results if r.loss is not None), key=lambda entry: entry[1])
    evidence: dict[str, Any] = {"losses": {result.name: loss for result, loss in ranked}}
    if len({str(run.config.get("data", {}).get("validation")) for run in study.sft}) > 1:
        text = "The sets were validated on different trajectories, so their losses are not comparable."
        return Answer(question, text, evidence)
    if not ranked:
        return Answer(question, "No set has a finite validation loss.", evidence)
    losses = ", ".join(f"{result.name} {loss:.3f}" for result, loss in ranked)
    text = f"{ranked[0][0].name}: it has the lowest minimum validation loss ({losses} nats per token)."
    what, pairs = _loss_and_height(ranked)
    if len(pairs) < 2:
        text += (
            " RL was run on fewer than two sets, so this study does not test whether the loss predicts where RL ends."
        )
        return Answer(question, text, evidence)
    x, y = zip(*pairs, strict=True)
    pearson, spearman = correlate(x, y, "pearson"), correlate(x, y, "spearman")
    evidence |= {"against": what, "pearson": vars(pearson), "spearman": vars(spearman), "sets": len(pairs)}
    text += (
        f" Over {len(pairs)} sets, the correlation of the loss with the {what} is Pearson {pearson}, "
        f"Spearman {spearman}. {_correlation_verdict(pearson, len(pairs))}"
    )
    return Answer(question, text, evidence, pearson.high is not None and pearson.high < 0)


def _loss_and_height(ranked: Sequence[tuple[SetResult, float]]) -> tuple[str, list[tuple[float, float]]]:
    """Return the loss of each set with how high RL gets on it: by ceiling if every set has an identified one."""
    ceilings = [(loss, result.ceiling) for result, loss in ranked if result.ceiling is not None]
    if len(ceilings) == len(ranked):
        return "highest identified ceiling", ceilings
    ends = [(loss, result.end.value) for result, loss in ranked if result.end]
    return "highest last score (not every set has an identified ceiling)", ends


def _correlation_verdict(pearson: Correlation, sets: int) -> str:
    if pearson.value is None:
        return "There is no correlation because one of the two is the same for all sets."
    if pearson.low is None or pearson.high is None:
        return (
            f"{sets} sets are too few for an interval, so this shows a direction at most; "
            f"{PAPER} found -0.92 and -1.00 over five sets."
        )
    if pearson.high < 0:
        return f"The interval excludes zero: the lower the loss, the higher RL ends, as {PAPER} found."
    if pearson.low > 0:
        return f"The interval excludes zero: the lower the loss, the lower RL ends, contrary to {PAPER}."
    return "The interval includes zero, so this study does not confirm the order by loss."
