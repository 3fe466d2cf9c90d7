"""What a study answers, in words, with the numbers behind each sentence: when to switch, what RL can still give, which data to buy.

Scores in percent, differences in points. Intervals of scores and their differences are 95 %: over seeds Welch's t, where there are
two seeds or more; of one seed the binomial error of the test problems, which knows nothing of what another seed would change. Intervals
of ceilings are the fit's 90 %. A claim is `supported` where the interval says so; otherwise the text says what is missing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from scipy import special

from pctrain.ceiling.correlation import Correlation, correlate
from pctrain.ceiling.monitor import SURE, Monitor
from pctrain.report.study_data import RLRun, SFTRun, Study

CONFIDENCE = 0.95
LIKE = 0.1  # sets whose sizes differ by less than this share count as of one size
ONE_SEED = "one seed: the interval knows the test problems only"


@dataclass(frozen=True)
class Answer:
    """`evidence`: plain JSON values. `supported`: whether the numbers bear the claim that the text makes."""

    question: str
    text: str
    evidence: dict[str, Any] = field(default_factory=dict)
    supported: bool = False


def answers(study: Study) -> list[Answer]:
    """In the order in which one would ask. Questions that the study does not touch (sets, where there is one) are left out."""
    found = [*_when_to_switch(study), *_what_is_left(study), *_which_way(study)]
    if len({run.set for run in study.sft}) > 1:
        found += [_more_or_harder(study), _which_set_first(study)]
    return [*found, _not_supported(study, found)]


# ---- scores over seeds


@dataclass(frozen=True)
class Score:
    """Mean over seeds of a last score, with its standard error and the degrees of freedom of that."""

    mean: float
    se: float
    freedom: float
    seeds: int

    def __str__(self) -> str:
        half = self.se * _t(self.freedom)
        return f"{self.mean:.1f} % ({max(0.0, self.mean - half):.1f} to {min(100.0, self.mean + half):.1f})"


def _score(readings: Sequence[tuple[float, float]]) -> Score:
    """Of (score, standard error) of each seed."""
    n = len(readings)
    mean = math.fsum(score for score, _ in readings) / n
    if n == 1:
        return Score(mean, readings[0][1], math.inf, 1)
    return Score(mean, math.sqrt(math.fsum((score - mean) ** 2 for score, _ in readings) / (n - 1) / n), n - 1, n)


@dataclass(frozen=True)
class Difference:
    points: float
    low: float
    high: float

    @property
    def told_apart(self) -> bool:
        return self.low > 0 or self.high < 0

    def __str__(self) -> str:
        return f"{self.points:+.1f} points ({self.low:+.1f} to {self.high:+.1f})"


def _difference(a: Score, b: Score) -> Difference:
    """a - b, Welch's interval."""
    error = math.hypot(a.se, b.se)
    finite = [(score.se**4, score.freedom) for score in (a, b) if math.isfinite(score.freedom) and score.se]
    freedom = error**4 / math.fsum(part / df for part, df in finite) if finite else math.inf
    half, points = error * _t(freedom), a.mean - b.mean
    return Difference(points, points - half, points + half)


def _t(freedom: float) -> float:
    quantile = (1 + CONFIDENCE) / 2
    return float(special.ndtri(quantile) if math.isinf(freedom) else special.stdtrit(freedom, quantile))


# ---- when to switch


def _when_to_switch(study: Study) -> list[Answer]:
    """One answer for each set and algorithm that RL was started with from SFT checkpoints."""
    found = []
    for name, algorithm in _keys(study.rl, lambda run: (run.set, run.algorithm)):
        starts: dict[str, list[RLRun]] = {}
        for run in study.rl:
            if (run.set, run.algorithm) == (name, algorithm) and run.last and run.start_step:
                starts.setdefault(run.role if run.role != "none" else f"step {run.start_step}", []).append(run)
        if starts:
            found.append(_switch(study, name, algorithm, starts))
    return found


def _switch(study: Study, name: str, algorithm: str, starts: dict[str, list[RLRun]]) -> Answer:
    ends = {start: _score([(run.last.score, run.last.score_se) for run in runs]) for start, runs in starts.items()}
    ranked = sorted(ends, key=lambda start: -ends[start].mean)
    best, at = ranked[0], {start: sorted({run.start_step for run in runs}) for start, runs in starts.items()}
    question = f"When to switch from SFT to RL{_of(study, name, algorithm)}?"
    evidence = {"set": name, "algorithm": algorithm, "ends": {s: vars(ends[s]) for s in ranked}, "steps": at}
    minimum, text = _minimum(study, name)
    evidence["minimum_passed"] = minimum
    if len(ranked) == 1:
        text += (
            f" RL was started from there alone ({_steps(at[best])}) and ended at {ends[best]}: that another start ends lower is the "
            "paper's finding, not this study's."
        )
        return Answer(question, text.strip(), evidence)
    lead = _difference(ends[best], ends[ranked[1]])
    evidence["lead"] = vars(lead)
    regime = starts[best][0].start_regime
    text += (
        f" RL from {_named(best)} ({_steps(at[best])}{', ' + regime if regime else ''}) ended highest, at {ends[best]}, "
        f"{lead} against {_named(ranked[1])}"
    )
    text += ": switch there." if lead.told_apart else ": the interval holds 0, so these two starts are not told apart."
    return Answer(question, text.strip(), evidence, lead.told_apart)


def _minimum(study: Study, name: str) -> tuple[float | None, str]:
    """(the monitor's probability that the minimum is passed, a sentence on the validation loss) of a set's SFT, the least over seeds."""
    runs = [run for run in study.sft if run.set == name and run.best]
    if not runs:
        return None, ""
    passed = min(minimum_passed(run) for run in runs)
    steps = _steps(sorted({run.best.step for run in runs}))
    loss = math.fsum(run.best.val_loss for run in runs) / len(runs)
    text = f"The validation loss was lowest at {steps} ({loss:.3f} nats a token); "
    if passed >= SURE:
        return passed, text + f"the minimum is passed (confidence {passed:.0%})."
    return (
        passed,
        text + f"it is not sure that the minimum is passed (confidence {passed:.0%}), so more SFT may move it.",
    )


def minimum_passed(run: SFTRun) -> float:
    """The monitor's probability after the last validation of an SFT run."""
    monitor, passed = Monitor(run.delta, run.delta2), 0.0
    for point in run.losses:
        passed = monitor.add(point.step, point.eflops_sft, point.val_loss, point.val_loss_se).passed
    return passed


# ---- what RL can still give


def _what_is_left(study: Study) -> list[Answer]:
    fitted = [run for run in study.rl if run.fit is not None and run.last]
    if not study.rl:
        return []
    said, rows = [], []
    for run in fitted:
        fit, last = run.fit, run.last.score
        left = [fit.a_post_low - last, fit.a_post - last, fit.a_post_high - last]
        rows.append(
            {
                "run": run.name,
                "verdict": fit.verdict,
                "last": last,
                "ceiling": [fit.a_post_low, fit.a_post, fit.a_post_high],
            }
        )
        if fit.verdict == "identified":
            said.append(
                f"RL from {run.label} has a ceiling of {fit.a_post:.1f} % (90 % interval {fit.a_post_low:.1f} to "
                f"{fit.a_post_high:.1f}): more of it gives {left[1]:+.1f} points ({left[0]:+.1f} to {left[2]:+.1f}) on the last "
                f"score of {last:.1f} %."
            )
        elif fit.verdict == "lower_bound":
            said.append(
                f"RL from {run.label} still rises: its ceiling is at least {fit.a_post_low:.1f} %, how much more is not known."
            )
        elif fit.verdict == "collapsed":
            said.append(
                f"RL from {run.label} collapsed; before that it was heading for {fit.a_post:.1f} % ({fit.a_post_low:.1f} to "
                f"{fit.a_post_high:.1f})."
            )
    silent = len(study.rl) - len(said)
    if silent:
        said.append(f"Nothing is said about {silent} of {len(study.rl)} RL runs: too few scores, or no rise yet.")
    supported = any(row["verdict"] == "identified" for row in rows)
    return [Answer("What can RL still give?", " ".join(said), {"fits": rows}, supported)]


# ---- which way of training


def _which_way(study: Study) -> list[Answer]:
    """SFT alone, RL alone, one after the other, both at once: by the last score, each at its own compute."""
    ways: dict[str, list[tuple[float, float]]] = {}
    spent: dict[str, list[float]] = {}
    for run in study.sft:
        if run.scores:
            ways.setdefault(f"SFT alone{_on(run.set)}", []).append((run.scores[-1].score, run.scores[-1].score_se))
            spent.setdefault(f"SFT alone{_on(run.set)}", []).append(run.scores[-1].eflops_sft)
    for run in study.rl:
        if run.last:
            way = (
                f"{run.algorithm} without SFT"
                if not run.start_step
                else f"SFT{_on(run.set)} then {run.algorithm} from {_start(run)}"
            )
            ways.setdefault(way, []).append((run.last.score, run.last.score_se))
            spent.setdefault(way, []).append(run.eflops_total)
    if not any(run.start_step == 0 for run in study.rl) or len(ways) < 2:
        return []
    scores = {way: _score(readings) for way, readings in ways.items()}
    ranked = sorted(scores, key=lambda way: -scores[way].mean)
    lead = _difference(scores[ranked[0]], scores[ranked[1]])
    totals = {way: math.fsum(values) / len(values) for way, values in spent.items()}
    text = f"{ranked[0]} ended highest, at {scores[ranked[0]]}, {lead} against {ranked[1]}"
    text += "." if lead.told_apart else ": not told apart."
    text += (
        " In order: "
        + ", ".join(f"{way} {scores[way].mean:.1f} %" for way in ranked)
        + ". Each at its own compute: the least spent "
        f"{min(totals.values()):.3g} EFLOPs, the most {max(totals.values()):.3g}."
    )
    evidence = {"scores": {way: vars(scores[way]) for way in ranked}, "eflops": totals, "lead": vars(lead)}
    return [Answer("Which way of training ends highest?", text, evidence, lead.told_apart)]


# ---- sets


@dataclass(frozen=True)
class SetResult:
    """`loss`: minimum of the validation loss; `end`: the highest last score of RL; `ceiling`: the highest that is identified. Means over
    seeds."""

    name: str
    size: int | None
    difficulty: str | None
    loss: float | None
    end: Score | None
    ceiling: float | None

    @property
    def told(self) -> str:
        parts = [f"{self.size} trajectories"] if self.size else []
        return self.name + (
            f" ({', '.join(parts + ([self.difficulty] if self.difficulty else []))})"
            if parts or self.difficulty
            else ""
        )


def _results(study: Study) -> list[SetResult]:
    found = []
    for name in _keys(study.sft, lambda run: run.set):
        sft = [run for run in study.sft if run.set == name]
        losses = [run.best.val_loss for run in sft if run.best]
        rl = [run for run in study.rl if run.set == name and run.last]
        by_way: dict[tuple, list[RLRun]] = {}
        for run in rl:
            by_way.setdefault((run.algorithm, run.role, run.start_step if run.role == "none" else 0), []).append(run)
        ends = [_score([(run.last.score, run.last.score_se) for run in runs]) for runs in by_way.values()]
        ceilings = [
            math.fsum(run.fit.a_post for run in runs) / len(runs)
            for runs in by_way.values()
            if all(run.fit and run.fit.verdict == "identified" for run in runs)
        ]
        found.append(
            SetResult(
                name,
                sft[0].size,
                sft[0].difficulty,
                math.fsum(losses) / len(losses) if losses else None,
                max(ends, key=lambda end: end.mean, default=None),
                max(ceilings, default=None),
            )
        )
    return found


def _more_or_harder(study: Study) -> Answer:
    """Pairs of sets of one difficulty and different sizes, and of one size and different difficulties."""
    question, results = "Is more data, or harder data, worth more?", [r for r in _results(study) if r.end]
    more, harder = [], []
    for i, a in enumerate(results):
        for b in results[i + 1 :]:
            small, large = sorted((a, b), key=lambda r: r.size or 0)
            if not (a.size and b.size and a.difficulty and b.difficulty):
                continue
            alike = large.size <= (1 + LIKE) * small.size
            if a.difficulty == b.difficulty and not alike:
                more.append((large, small, _difference(large.end, small.end)))
            elif alike and {a.difficulty, b.difficulty} != {a.difficulty}:
                order = ("easy", "uniform", "hard")
                easy, hard = sorted((a, b), key=lambda r: order.index(r.difficulty))
                harder.append((hard, easy, _difference(hard.end, easy.end)))
    evidence = {
        "sets": [{"set": r.name, "size": r.size, "difficulty": r.difficulty, "end": vars(r.end)} for r in results]
    }
    ends = "; ".join(f"{r.told} ended at {r.end}" for r in sorted(results, key=lambda r: -r.end.mean))
    if not more and not harder:
        why = (
            "that takes sets of one difficulty and several sizes, and of one size and several difficulties, both of them known "
            "(`pctrain data select` writes them down)"
        )
        return Answer(question, f"Not told by these sets: {why}. Best ends: {ends or 'none'}.", evidence)
    said = [f"more of the same: {large.told} against {small.told} {d}" for large, small, d in more]
    said += [f"harder: {hard.told} against {easy.told} {d}" for hard, easy, d in harder]
    evidence |= {"more": [vars(d) for *_, d in more], "harder": [vars(d) for *_, d in harder]}
    if not more or not harder:
        said.append(f"what {'more' if harder else 'harder'} data gives was not tried")
        return Answer(question, "; ".join(said) + ".", evidence)
    best_more, best_harder = (max((d for *_, d in pairs), key=lambda d: d.points) for pairs in (more, harder))
    apart = best_more.low > best_harder.high or best_harder.low > best_more.high
    winner = "more" if best_more.points > best_harder.points else "harder"
    said.append(f"{winner} data gave more here" if apart else "the two gains are not told apart")
    return Answer(question, "; ".join(said) + ".", evidence, apart)


def _which_set_first(study: Study) -> Answer:
    question, results = "Which set first?", [r for r in _results(study) if r.loss is not None]
    ranked = sorted(results, key=lambda r: r.loss)
    evidence: dict[str, Any] = {"losses": {r.name: r.loss for r in ranked}}
    if len({str(run.config.get("data", {}).get("validation")) for run in study.sft}) > 1:
        text = "The sets were validated on different trajectories: their losses are not comparable."
        return Answer(question, text, evidence)
    if not ranked:
        return Answer(question, "No set has a finite validation loss.", evidence)
    losses = ", ".join(f"{r.name} {r.loss:.3f}" for r in ranked)
    text = f"{ranked[0].name}: its minimum validation loss is the lowest ({losses})."
    identified = all(r.ceiling is not None for r in ranked)
    heights = [(r.loss, r.ceiling if identified else r.end.mean) for r in ranked if identified or r.end]
    what = (
        "highest identified ceiling" if identified else "highest last score (not every set has an identified ceiling)"
    )
    if len(heights) < 2:
        text += " RL was run on fewer than two sets: whether the loss predicts its height is not tested here."
        return Answer(question, text, evidence)
    pearson, spearman = (correlate(*zip(*heights), kind) for kind in ("pearson", "spearman"))
    evidence |= {"against": what, "pearson": vars(pearson), "spearman": vars(spearman), "sets": len(heights)}
    text += (
        f" Against the {what} over {len(heights)} sets the loss correlates by Pearson {pearson}, Spearman {spearman}"
    )
    text += _weight(pearson, len(heights))
    return Answer(question, text, evidence, pearson.high is not None and pearson.high < 0)


def _weight(pearson: Correlation, sets: int) -> str:
    if pearson.high is None:
        return f": {sets} sets are too few for an interval, so this is a direction at most (the paper found -0.92 and -1.00 over five)."
    if pearson.high < 0:
        return ": the lower the loss, the higher RL ends, as the paper found."
    return ": the interval holds 0, so the order by loss is not confirmed here."


# ---- what is not supported


def _not_supported(study: Study, found: Sequence[Answer]) -> Answer:
    said = [f"the answer to “{answer.question}”" for answer in found if not answer.supported]
    seeds = {run.seed for run in study.runs}
    if len(seeds) == 1:
        said.append(f"anything about other seeds ({ONE_SEED})")
    if not any(run.start_step == 0 for run in study.rl):
        said.append("a comparison with RL without SFT, which was not run")
    if not study.sft or not any(run.scores for run in study.sft):
        said.append("a comparison with SFT alone, which was not scored")
    if len({run.set for run in study.sft}) < 2:
        said.append("anything about other data: there is one set")
    text = "It does not support " + "; ".join(said) + "." if said else "Every answer above is borne by its interval."
    return Answer("What does the evidence not support?", text, {"not_supported": said}, True)


# ---- words


def _keys(runs: Iterable[Any], key: Callable[[Any], Any]) -> list[Any]:
    return list(dict.fromkeys(key(run) for run in runs))


def _of(study: Study, name: str, algorithm: str) -> str:
    several = len({run.algorithm for run in study.rl if run.start_step}) > 1
    return _on(name) + (f", with {algorithm}" if several else "")


def _on(name: str) -> str:
    return f" on {name}" if name else ""


def _steps(steps: Sequence[int]) -> str:
    return f"step{'s' if len(steps) > 1 else ''} {' and '.join(map(str, steps))}"


def _named(start: str) -> str:
    return {
        "early": "the early checkpoint",
        "stable": "the validation minimum",
        "overfit": "the overfit checkpoint",
    }.get(start, start)


def _start(run: RLRun) -> str:
    return _named(run.role if run.role != "none" else f"step {run.start_step}")
