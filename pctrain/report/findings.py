"""The headline of a report and what the study shows. not_shown.py has what it does not show.

Every sentence is computed from the numbers of this study, with its interval. Two scores differ if the 95% interval of
their difference excludes zero (ceiling/stats.py), here as in the answers.
"""

from __future__ import annotations

from dataclasses import replace

from pctrain.ceiling.stats import Measured, difference
from pctrain.report.looks import flops_text, shows_ceiling
from pctrain.report.study_data import FittedRun, ScoredRun, SFTRun, Study
from pctrain.report.wording import EXCLUDES_ZERO, ceiling, listed, percent, points, signed_points

MOST_SENTENCES = 6  # runs that get a sentence each; more runs are summed up, and the tables list them


# -- runs and their differences ----------------------------------------------------------------------------------------


def ranked_runs(study: Study) -> list[ScoredRun]:
    """Return the runs with two scores or more, the highest last score first."""
    return sorted((run for run in study.scored if len(run.points) > 1), key=lambda run: -run.last.score)


def gain_of(run: ScoredRun) -> Measured:
    """Return the last score minus the first, in points."""
    return difference(run.last.measured, run.first.measured)


def lead_of(run: ScoredRun, other: ScoredRun) -> Measured:
    """Return the last score of `run` minus that of `other`, in points."""
    return difference(run.last.measured, other.last.measured)


def sft_label(run: SFTRun) -> str:
    """Return the name of an SFT run in a sentence."""
    return f"SFT on {run.label}" if run.label else "SFT"


def longest_sft(study: Study) -> float:
    """Return the EFLOPs of the longest SFT run."""
    return max((run.end.eflops_sft for run in study.sft if run.end), default=0.0)


# -- headline ----------------------------------------------------------------------------------------------------------


def headline(study: Study) -> str:
    """Return the sentence at the top of the report."""
    ranked = ranked_runs(study)
    if not ranked:
        return _headline_of_sft(study)
    if any("seed" in run.varies for run in ranked):
        return _headline_of_seeds(ranked)
    if len(ranked) == 1:
        return f"RL from {ranked[0].label} took the score {_change(ranked[0])}."
    lead = lead_of(ranked[0], ranked[1])
    verdict = EXCLUDES_ZERO if lead.excludes_zero else "The two starts are statistically indistinguishable."
    return (
        f"RL from {ranked[0].label} ended highest, at {ranked[0].last.score:.1f}%. Its lead over RL from "
        f"{ranked[1].label} is {points(lead)}. {verdict}"
    )


def _headline_of_sft(study: Study) -> str:
    best = max((p for sft in study.sft for p in sft.scores), key=lambda p: p.score, default=None)
    if best is None:
        return "No run has been scored twice yet."
    score = percent(Measured(best.score, best.score_se))
    return f"SFT alone reached {score} at step {best.step}. No RL run has two scores yet."


def _headline_of_seeds(ranked: list[ScoredRun]) -> str:
    """Compare means over seeds. The answers say which of their differences the seeds support."""
    groups: dict[str, list[ScoredRun]] = {}
    for run in ranked:
        groups.setdefault(replace(run, varies=run.varies - {"seed"}).label, []).append(run)
    means = {label: sum(run.last.score for run in runs) / len(runs) for label, runs in groups.items()}
    top = max(means, key=lambda label: means[label])
    seeds = f"mean of {len(groups[top])} seeds" if len(groups[top]) > 1 else "one seed"
    return (
        f"RL from {top} ended highest of {len(groups)} ways tried, at {means[top]:.1f}% ({seeds}). "
        "The answers below say which differences their intervals support."
    )


def _change(run: ScoredRun) -> str:
    return f"from {run.first.score:.1f}% to {run.last.score:.1f}%, {signed_points(gain_of(run))}"


# -- findings ----------------------------------------------------------------------------------------------------------


def findings(study: Study) -> list[str]:
    """Return what the numbers of this study say."""
    if len(study.sft) > MOST_SENTENCES:
        of_sft = _loss_summary(study)
    else:
        of_sft = [sentence for sft in study.sft for sentence in _loss_sentence(sft)]
    if len(study.rl) > MOST_SENTENCES:
        of_rl = [
            *_gain_summary(study),
            *_best_start(study),
            *_sft_comparison_summary(study),
            *_highest_ceilings(study),
        ]
    else:
        of_rl = [
            *(_gain_sentence(run) for run in study.scored if len(run.points) > 1),
            *_best_start(study),
            *_sft_comparison(study),
            *(_ceiling_sentence(run) for run in study.rl if shows_ceiling(run)),
        ]
    return [*_what_was_run(study), *of_sft, *of_rl]


def _what_was_run(study: Study) -> list[str]:
    sentences = []
    if len(study.sft) > MOST_SENTENCES:
        sets = sorted({sft.set for sft in study.sft if sft.set})
        on_sets = f" on {listed(sets)}" if sets else ""
        sentences.append(
            f"SFT was run {len(study.sft)} times{on_sets}, with at most {flops_text(longest_sft(study))} of training "
            "compute."
        )
    else:
        for sft in study.sft:
            if sft.end:
                compute = flops_text(sft.end.eflops_sft)
                sentences.append(f"{sft_label(sft)} ran to step {sft.end.step} ({compute} of training compute).")
    if study.rl:
        labels = [run.label for run in study.rl]
        how = f"was run {len(labels)} times" if len(labels) > MOST_SENTENCES else f"was started from {listed(labels)}"
        algorithms = sorted({run.algorithm for run in study.rl if run.config_text})  # a file of curves has none
        sentences.append(f"RL{f' ({listed(algorithms)})' if algorithms else ''} {how}.")
    return sentences


def _loss_sentence(sft: SFTRun) -> list[str]:
    if sft.best is None:
        return []
    seen = list(dict.fromkeys(p.regime for p in sft.losses))
    last = sft.losses[-1]
    rise = last.val_loss / sft.best.val_loss - 1
    of_run = f" of {sft_label(sft)}" if sft.label else ""
    return [
        f"The validation loss{of_run} was lowest at step {sft.best.step} ({sft.best.val_loss:.3f} nats per token). At "
        "the "
        f"end it was {last.val_loss:.3f}, {100 * rise:.0f}% higher. Regimes in order of appearance: {listed(seen)}."
    ]


def _loss_summary(study: Study) -> list[str]:
    """Return one sentence per set on the minima over its seeds."""
    sentences = []
    for name in dict.fromkeys(sft.set for sft in study.sft):
        best = [sft.best for sft in study.sft if sft.set == name and sft.best]
        if best:
            losses, steps = [point.val_loss for point in best], [point.step for point in best]
            sentences.append(
                f"The lowest validation loss{f' on {name}' if name else ''} was {min(losses):.3f} to {max(losses):.3f} "
                f"nats per token over {len(best)} runs, at steps {min(steps)} to {max(steps)}."
            )
    return sentences


def _gain_sentence(run: ScoredRun) -> str:
    regime = f", started in the {run.start_regime} regime," if run.start_regime else ""
    verdict = EXCLUDES_ZERO if gain_of(run).excludes_zero else "This is statistically indistinguishable from no change."
    return f"RL from {run.label}{regime} took the score {_change(run)}. {verdict}"


def _gain_summary(study: Study) -> list[str]:
    gains = [gain_of(run) for run in ranked_runs(study)]
    if not gains:
        return []
    up, down = _counted(gains)
    return [
        f"Of {len(gains)} RL runs, {up} ended above and {down} below their first score with a 95% interval that "
        "excludes "
        f"zero. The change of the other {len(gains) - up - down} is statistically indistinguishable from zero. "
        "The tables list all runs."
    ]


def _counted(differences: list[Measured]) -> tuple[int, int]:
    """Return how many differences are above and below zero with an interval that excludes it."""
    clear = [d for d in differences if d.excludes_zero]
    up = sum(d.value > 0 for d in clear)
    return up, len(clear) - up


def _best_start(study: Study) -> list[str]:
    ranked = ranked_runs(study)
    if len(ranked) < 2 or "seed" in ranked[0].varies:
        return []
    first, second = ranked[:2]
    lead = lead_of(first, second)
    verdict = EXCLUDES_ZERO if lead.excludes_zero else "The two starts are statistically indistinguishable."
    most = max(ranked, key=lambda run: gain_of(run).value)
    return [
        f"RL from {first.label} has the highest last score, {points(lead, f'above RL from {second.label}')}. {verdict} "
        f"RL from {most.label} has the largest gain, {signed_points(gain_of(most))}."
    ]


def _leads_over_sft(study: Study) -> list[tuple[ScoredRun, Measured, Measured]]:
    """Return the runs with pure SFT's score at their total compute and their lead over it."""
    return [
        (run, run.sft_equal, difference(run.last.measured, run.sft_equal))
        for run in study.scored
        if isinstance(run.sft_equal, Measured)
    ]


def _sft_comparison(study: Study) -> list[str]:
    sentences = []
    for run, sft, lead in _leads_over_sft(study):
        size, side = (lead, "higher") if lead.value >= 0 else (difference(sft, run.last.measured), "lower")
        verdict = EXCLUDES_ZERO if lead.excludes_zero else "The two are statistically indistinguishable."
        sentences.append(
            f"At equal total compute ({flops_text(run.eflops_total)}), pure SFT scored {percent(sft)}. SFT then RL "
            "from "
            f"{run.label} ended {points(size, side)}. {verdict}"
        )
    return sentences


def _sft_comparison_summary(study: Study) -> list[str]:
    leads = [lead for _, _, lead in _leads_over_sft(study)]
    if not leads:
        return []
    above, below = _counted(leads)
    return [
        f"At equal total compute, {above} of {len(leads)} RL runs ended above pure SFT and {below} below it with a 95% "
        "interval that excludes zero."
    ]


def _ceiling_sentence(run: FittedRun) -> str:
    fit = run.fit
    if fit.verdict == "identified":
        return (
            f"The ceiling of RL from {run.label} is {ceiling(fit)}. It is identified. "
            f"The plasticity PL_rl is {fit.pl_rl:.1f} points above P_sft of {fit.p_sft:.1f}%."
        )
    if fit.verdict == "lower_bound":
        return (
            f"The ceiling of RL from {run.label} has only a lower bound: under the fit's model it is above "
            f"{fit.a_post_low:.1f}% with 95% probability. The curve does not say how far above."
        )
    at = f" after {flops_text(fit.collapsed_at)} of RL" if fit.collapsed_at is not None else ""
    return (
        f"RL from {run.label} collapsed{at}. The fit uses the scores before the collapse; they were heading for a "
        "ceiling "
        f"of {ceiling(fit)}."
    )


def _highest_ceilings(study: Study) -> list[str]:
    """Return one sentence per set."""
    sentences = []
    for name in dict.fromkeys(run.set for run in study.rl):
        runs = [run for run in study.rl if run.set == name and shows_ceiling(run)]
        if runs:
            top = max(runs, key=lambda run: run.fit.a_post)
            identified = sum(run.fit.verdict == "identified" for run in runs)
            sentences.append(
                f"The highest ceiling estimate {f'on {name}' if name else 'without SFT or a named set'} is that of RL "
                "from "
                f"{top.label}: {ceiling(top.fit)}, {top.fit.verdict.replace('_', ' ')}. "
                f"{identified} of {len(runs)} ceilings are identified."
            )
    return sentences
