"""The sentences of "What this does not show": results a reader might expect and this study does not or cannot give."""

from __future__ import annotations

from collections.abc import Sequence

from pctrain.ceiling.fit import MIN_POINTS
from pctrain.report.findings import MOST_SENTENCES, lead_of, longest_sft, ranked_runs, sft_label
from pctrain.report.looks import flops_text
from pctrain.report.study_data import FittedRun, NotMeasured, RLRun, ScoredRun, SFTRun, Study
from pctrain.report.wording import PAPER, listed, points, times

PAPER_LEAST_EFLOPS = 0.6  # the smallest SFT checkpoint in the paper's table (S1K, 62 steps, Qwen2.5-7B), before any RL
TRUNCATED = 0.05  # share of responses truncated at the length limit above which the report mentions it
UNEQUAL = 1.1  # ratio of total compute above which runs count as having spent different amounts


def not_shown(study: Study) -> list[str]:
    """Return the sentences of "What this does not show"."""
    return [
        *(f"{name} has only just begun and is not shown." for name in study.just_begun),
        *_missing_sft(study),
        *_missing_rl(study),
        *_missing_comparison(study),
        *_paper_ordering(study),
        *_unresolved(study),
        *_unequal_compute(study),
        *_no_ceiling(study),
        *_truncated(study),
        *_scale(study),
        *_seeds(study),
    ]


# -- what was not run or not measured ----------------------------------------------------------------------------------


def _missing_sft(study: Study) -> list[str]:
    if not study.sft:
        return ["There is no SFT run in this folder, so regimes and pure SFT at equal compute are not shown."]
    sentences = []
    if not any(sft.losses for sft in study.sft):
        sentences.append(
            "SFT has no validation loss, so nothing is said about regimes or about the loss and the ceiling."
        )
    return sentences + [sentence for sft in study.sft for sentence in _missing_of_sft(sft)]


def _missing_of_sft(sft: SFTRun) -> list[str]:
    sentences = []
    seen = {p.regime for p in sft.losses}
    absent = [regime for regime in ("adaptive", "stable", "mild", "severe") if regime not in seen]
    if sft.losses and absent:
        regimes, them = ("regime", "it") if len(absent) == 1 else ("regimes", "them")
        sentences.append(
            f"No validation of {sft_label(sft)} is in the {listed(absent, 'or')} {regimes}, so nothing is said about "
            f"{them}."
        )
    if sft.not_finite:
        losses, belong = ("loss was", "belongs") if sft.not_finite == 1 else ("losses were", "belong")
        sentences.append(
            f"{sft.not_finite} validation {losses} not finite (nan or infinity) and {belong} to no regime."
        )
    if not sft.scores:
        sentences.append(
            f"{sft_label(sft)} itself was not scored (sft.eval_every is 0), so there is no pure SFT to compare with."
        )
    return sentences


def _missing_rl(study: Study) -> list[str]:
    if not study.rl:
        return ["No RL was run, so nothing is said about RL, gains or ceilings."]
    sentences = []
    if not any(run.start_step == 0 for run in study.rl):
        sentences.append("RL without SFT was not run, so it is not compared with SFT followed by RL.")
    for run in study.rl:
        gain = run.gain
        if isinstance(gain, NotMeasured):
            sentences.append(f"RL from {run.label} has no gain: {gain.reason}.")
    return sentences


def _missing_comparison(study: Study) -> list[str]:
    """Name the RL runs without a score of pure SFT at their total compute, in a study that scored SFT."""
    if not any(sft.scores for sft in study.sft):
        return []
    without = [(run, run.sft_equal) for run in study.rl if isinstance(run.sft_equal, NotMeasured)]
    if without and len(study.rl) > MOST_SENTENCES:
        return [
            f"The score of pure SFT at equal total compute is not known for {len(without)} of {len(study.rl)} RL runs."
        ]
    return [
        f"The score of pure SFT at {flops_text(run.eflops_total)}, the total compute of RL from {run.label}, is not "
        "known: "
        f"{missing.reason}."
        for run, missing in without
    ]


# -- what the scores do not settle -------------------------------------------------------------------------------------


def _paper_ordering(study: Study) -> list[str]:
    """Compare this study with the paper's claim that overfitting, severe above all, makes RL end lower.

    Only for a study in which nothing but the start differs; if more differs, the answers compare means over seeds.
    """
    if any(run.varies for run in study.rl):
        return []
    stable, overfit = _first_with_role(study, "stable"), _first_with_role(study, "overfit")
    if not stable or not overfit:
        return []
    lead = lead_of(overfit, stable)
    unclear = "the two are statistically indistinguishable"
    regime = f", {overfit.start_regime} regime" if overfit.start_regime else ""
    start = f"the overfit start (step {overfit.start_step}{regime})"
    if lead.value >= 0:
        head_start = overfit.first.score - stable.first.score
        sentences = [
            f"{PAPER[0].upper()}{PAPER[1:]} finds that overfitting before the switch, severe overfitting above all, "
            "makes RL "
            f"end lower. Not here: RL from {start} ended {points(lead, 'above RL from the stable start')}, not below "
            "it.",
            "" if lead.excludes_zero else f"However, {unclear}.",
            f"It also began {head_start:.1f} points higher." if head_start > 0 else "",
        ]
        return [" ".join(sentence for sentence in sentences if sentence)]
    below = f"RL from {start} ended {points(lead_of(stable, overfit), 'below RL from the stable start')}"
    if not lead.excludes_zero:
        return [f"{below}. This is the direction that {PAPER} reports, but {unclear}."]
    return [f"{below}, as {PAPER} reports. One run of each does not make it a rule."]


def _first_with_role(study: Study, role: str) -> ScoredRun | None:
    return next((run for run in study.scored if run.role == role), None)


def _unresolved(study: Study) -> list[str]:
    """Name the runs that are statistically indistinguishable from the one that ended highest."""
    ranked = ranked_runs(study)
    if not ranked or "seed" in ranked[0].varies:  # the answers compare means over seeds
        return []
    best = ranked[0]
    close = [run.label for run in ranked[1:] if not lead_of(best, run).excludes_zero]
    if not close:
        return []
    others = f"{len(close)} other runs" if len(close) > MOST_SENTENCES else f"RL from {listed(close)}"
    are = "is" if len(close) == 1 else "are"
    return [
        f"Which start ends highest is not settled: {others} {are} statistically indistinguishable from RL from "
        f"{best.label}."
    ]


def _unequal_compute(study: Study) -> list[str]:
    totals = [run.eflops_total for run in ranked_runs(study)]
    if len(totals) < 2 or max(totals) <= UNEQUAL * min(totals):
        return []
    return [
        f"The runs did not spend the same total compute ({flops_text(min(totals))} to {flops_text(max(totals))}). "
        "Their last "
        "scores are compared as they are; later starts had more SFT."
    ]


# -- ceilings ----------------------------------------------------------------------------------------------------------

NO_CEILING = {
    "too_short": (
        f"No ceiling is estimated for RL from {{}}. A fit needs {MIN_POINTS} scores: run more RL steps or lower "
        "rl.eval_every."
    ),
    "flat": (
        "The curve of RL from {} is flat over the range that was run. Learning may not have started yet; a flat curve "
        "does not say where it would end."
    ),
    "lower_bound": "The level at which RL from {} would plateau is not identified. More RL steps are needed.",
    "collapsed": "What RL from {} would have reached without its collapse is not known.",
}


def _no_ceiling(study: Study) -> list[str]:
    sentences = [
        f"No curve was fitted to RL from {run.label}: {run.fit_reason}." for run in study.rl if run.fit is None
    ]
    for verdict, sentence in NO_CEILING.items():
        labels = [_fit_label(run) for run in study.fitted if run.fit.verdict == verdict]
        if len(study.rl) <= MOST_SENTENCES:
            sentences += [sentence.format(label) for label in labels]
        elif labels:
            sentences.append(sentence.format(listed(labels)))
    return sentences


def _fit_label(run: FittedRun) -> str:
    return f"{run.label}, which has {run.fit.n_used} scores" if run.fit.verdict == "too_short" else run.label


# -- limits ------------------------------------------------------------------------------------------------------------


def _truncated(study: Study) -> list[str]:
    shares = [(run, run.counts.get("eval_truncated_share", 0.0)) for run in study.rl]
    affected = [(run, share) for run, share in shares if share > TRUNCATED]
    if not affected:
        return []
    return [
        "At the last evaluation, some responses were truncated at the length limit "
        f"({_truncated_runs(affected, len(shares))}). "
        "Without a final answer they count as wrong; what longer responses would have scored is not known."
    ]


def _truncated_runs(affected: Sequence[tuple[RLRun, float]], runs: int) -> str:
    if len(affected) > MOST_SENTENCES:
        return f"up to {100 * max(share for _, share in affected):.0f}%, in {len(affected)} of {runs} RL runs"
    return listed([f"{100 * share:.0f}% in RL from {run.label}" for run, share in affected])


def _scale(study: Study) -> list[str]:
    longest = max([longest_sft(study), *(run.eflops_total for run in study.rl)])
    if not 0 < longest < PAPER_LEAST_EFLOPS:
        return []
    return [
        f"Scale: the longest run here, SFT included, spent {flops_text(longest)}. The smallest SFT checkpoint of "
        f"{PAPER} alone "
        f"spent {PAPER_LEAST_EFLOPS} EFLOPs, {times(PAPER_LEAST_EFLOPS / longest)} as much, on a model with 7 billion "
        "parameters. What holds here need not hold there, or vice versa."
    ]


def _seeds(study: Study) -> list[str]:
    seeds = sorted({run.seed for run in study.runs if run.config_text})
    if not seeds:
        return []
    if len(seeds) == 1:
        return [
            f"Each run was made once (seed {seeds[0]}). Intervals and standard errors count only the sampling of test "
            "problems; another seed may move a score by more."
        ]
    return [
        f"There are {len(seeds)} seeds. The intervals in these sentences and the standard errors in the tables are "
        "those of "
        "single runs and count only the sampling of test problems; the chart of scores shows means over seeds."
    ]
