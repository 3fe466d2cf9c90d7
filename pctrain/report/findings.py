"""What a report says in words. Every sentence is computed from the numbers of this study, with its standard error; nothing is taken
from the paper but the claims that it is compared with.
"""

from __future__ import annotations

from dataclasses import replace

from pctrain.ceiling.fit import MIN_POINTS
from pctrain.ceiling.stats import Measured, difference
from pctrain.report.looks import flops_text, shows_ceiling
from pctrain.report.study_data import RLRun, SFTRun, Study

PAPER_LEAST_EFLOPS = 0.6  # the smallest SFT checkpoint of the paper's table (S1K, 62 steps, Qwen2.5-7B), before any RL
CUT_SHORT = 0.05  # share of responses cut at the length limit from which the report says so
MOST_SENTENCES = 6  # runs that get sentences of their own; more of them are read in the tables


def headline(study: Study) -> str:
    """The one sentence at the top."""
    ranked = _ranked(study)
    if not ranked:
        best = max((p for sft in study.sft for p in sft.scores), key=lambda p: p.score, default=None)
        if best:
            return f"SFT alone reached {_percent(best.score, best.score_se)} at step {best.step}; no RL run has two scores yet."
        return "No run here has been scored twice yet."
    if any("seed" in run.varies for run in ranked):
        return _headline_of_seeds(ranked)
    if len(ranked) == 1:
        return f"RL from {ranked[0].label} took the score {_from_to(ranked[0])}."
    lead = difference(_last(ranked[0]), _last(ranked[1]))
    return (
        f"RL from {ranked[0].label} ended highest, at {ranked[0].last.score:.1f} %, {_points(lead)} above {ranked[1].label}"
        + (
            ": more than two standard errors."
            if _told_apart(lead)
            else ": within two standard errors, so this run does not settle which start is better."
        )
    )


def _headline_of_seeds(ranked: list[RLRun]) -> str:
    """By means over seeds; what their differences are worth is for the answers to say."""
    groups: dict[str, list[RLRun]] = {}
    for run in ranked:
        groups.setdefault(replace(run, varies=run.varies - {"seed"}).label, []).append(run)
    means = {label: sum(run.last.score for run in runs) / len(runs) for label, runs in groups.items()}
    top = max(means, key=means.get)
    seeds = f"mean of {len(groups[top])} seeds" if len(groups[top]) > 1 else "one seed"
    return (
        f"RL from {top} ended highest, at {means[top]:.1f} % ({seeds}), of {len(groups)} ways that were tried; what the differences "
        f"are worth stands below."
    )


def findings(study: Study) -> list[str]:
    """What the numbers of this run say."""
    if len(study.sft) > MOST_SENTENCES:
        said = [*_what_was_run(study), *_losses_counted(study)]
    else:
        said = [*_what_was_run(study), *(sentence for sft in study.sft for sentence in _loss_findings(sft))]
    if len(study.rl) > MOST_SENTENCES:
        return [
            *said,
            *_gains_counted(study),
            *_best_switch(study),
            *_against_sft_counted(study),
            *_highest_ceilings(study),
        ]
    return [
        *said,
        *(_gain_sentence(run) for run in study.rl if run.gain.value is not None),
        *_best_switch(study),
        *_against_sft(study),
        *(_ceiling_sentence(run) for run in study.rl if shows_ceiling(run)),
    ]


def _what_was_run(study: Study) -> list[str]:
    said = []
    if len(study.sft) > MOST_SENTENCES:
        sets = sorted({sft.set for sft in study.sft if sft.set})
        said.append(
            f"SFT was run {len(study.sft)} times{f', on {_listed(sets)}' if sets else ''}, to {flops_text(_longest_sft(study))} of "
            f"training compute at most."
        )
    for sft in study.sft if not said else []:
        if sft.end:
            last = sft.end
            said.append(f"{_sft(sft)} ran to step {last.step}, {flops_text(last.eflops_sft)} of training compute.")
    if study.rl:
        algorithms = sorted(
            {run.algorithm for run in study.rl if run.config_text}
        )  # a file of curves does not name them
        labels = [run.label for run in study.rl]
        how = f"was run {len(labels)} times" if len(labels) > MOST_SENTENCES else f"was started from {_listed(labels)}"
        said.append(f"RL{f' ({_listed(algorithms)})' if algorithms else ''} {how}.")
    return said


def _sft(run: SFTRun) -> str:
    return f"SFT on {run.label}" if run.label else "SFT"


def _loss_findings(sft: SFTRun) -> list[str]:
    if sft.best is None:
        return []
    seen = list(dict.fromkeys(p.regime for p in sft.losses))
    last = sft.losses[-1]
    rise = last.val_loss / sft.best.val_loss - 1
    of = f" of {_sft(sft)}" if sft.label else ""
    return [
        f"The validation loss{of} was lowest at step {sft.best.step} ({sft.best.val_loss:.3f} nats per token); at the end it was "
        f"{last.val_loss:.3f}, {100 * rise:.0f} % above that. Regimes in order of appearance: {_listed(seen)}."
    ]


def _losses_counted(study: Study) -> list[str]:
    """One sentence a set: minima over its seeds."""
    said = []
    for name in dict.fromkeys(sft.set for sft in study.sft):
        best = [sft.best for sft in study.sft if sft.set == name and sft.best]
        if best:
            losses, steps = [point.val_loss for point in best], [point.step for point in best]
            said.append(
                f"The lowest validation loss{f' on {name}' if name else ''} was {min(losses):.3f} to {max(losses):.3f} nats per "
                f"token over {len(best)} runs, at steps {min(steps)} to {max(steps)}."
            )
    return said


def _gain_sentence(run: RLRun) -> str:
    if _told_apart(run.gain):
        weight = "more than two standard errors."
    else:
        weight = "within two standard errors, so it cannot be told from no change."
    at = f", in the {run.start_regime} regime," if run.start_regime else ""
    return f"RL from {run.label}{at} took the score {_from_to(run)}, {weight}"


def _gains_counted(study: Study) -> list[str]:
    told = [run for run in study.rl if run.gain.value is not None]
    up, down = (
        sum(_told_apart(run.gain) and (run.gain.value > 0) is rising for run in told) for rising in (True, False)
    )
    return (
        [
            f"Of {len(told)} RL runs {up} ended above their start by more than two standard errors, {down} below it; of "
            f"{len(told) - up - down} the change cannot be told from none. The tables have each of them."
        ]
        if told
        else []
    )


def _against_sft_counted(study: Study) -> list[str]:
    leads = [difference(_last(run), run.sft_equal) for run in study.rl if run.last and run.sft_equal.value is not None]
    better = sum(_told_apart(lead) and lead.value > 0 for lead in leads)
    worse = sum(_told_apart(lead) and lead.value < 0 for lead in leads)
    return (
        [
            f"At equal total compute {better} of {len(leads)} RL runs ended above pure SFT by more than two standard errors, {worse} below "
            f"it."
        ]
        if leads
        else []
    )


def _highest_ceilings(study: Study) -> list[str]:
    """One sentence a set."""
    said = []
    for name in dict.fromkeys(run.set for run in study.rl):
        runs = [run for run in study.rl if run.set == name and shows_ceiling(run)]
        if runs:
            top = max(runs, key=lambda run: run.fit.a_post)
            identified = sum(run.fit.verdict == "identified" for run in runs)
            said.append(
                f"Highest estimate {f'on {name}' if name else 'without SFT or a named set'}: A_post {top.fit.a_post:.1f} %, 90 % "
                f"interval {top.fit.a_post_low:.1f} to {top.fit.a_post_high:.1f} ({top.fit.verdict.replace('_', ' ')}), RL from "
                f"{top.label}; {identified} of {len(runs)} ceilings are identified."
            )
    return said


def _best_switch(study: Study) -> list[str]:
    ranked = _ranked(study)
    if len(ranked) < 2 or "seed" in ranked[0].varies:
        return []
    lead = difference(_last(ranked[0]), _last(ranked[1]))
    gains = sorted(ranked, key=lambda run: -run.gain.value)
    clear = (
        "and that difference is more than two standard errors"
        if _told_apart(lead)
        else "but that difference is within two standard errors: this run does not settle which of the two is the better start"
    )
    return [
        f"The highest last score came from {ranked[0].label}, {_points(lead)} above {ranked[1].label}, {clear}. "
        f"The largest gain was that from {gains[0].label}, {_points(gains[0].gain)}."
    ]


def _against_sft(study: Study) -> list[str]:
    said = []
    for run in study.rl:
        if run.last and run.sft_equal.value is not None:
            lead = difference(_last(run), run.sft_equal)
            clear = "more than" if _told_apart(lead) else "within"
            said.append(
                f"At equal total compute ({flops_text(run.eflops_total)}) pure SFT scored "
                f"{_percent(run.sft_equal.value, run.sft_equal.se)}; SFT then RL from {run.label} was {abs(lead.value):.1f} points "
                f"{'higher' if lead.value >= 0 else 'lower'} (standard error {lead.se:.1f}), {clear} two standard errors."
            )
    return said


def _ceiling_sentence(run: RLRun) -> str:
    fit = run.fit
    estimate = f"{fit.a_post:.1f} %, 90 % interval {fit.a_post_low:.1f} to {fit.a_post_high:.1f}"
    if fit.verdict == "identified":
        return (
            f"Ceiling of RL from {run.label}: {estimate} (identified); "
            f"plasticity PL_rl {fit.pl_rl:.1f} points above P_sft {fit.p_sft:.1f} %."
        )
    if fit.verdict == "lower_bound":
        return (
            f"Ceiling of RL from {run.label}: only a lower bound. It is above {fit.a_post_low:.1f} % with 95 % probability under the "
            f"fit's model; the curve does not say how far above."
        )
    return (
        f"RL from {run.label} collapsed after {flops_text(fit.collapsed_at)} of RL. The fit uses the points before it and puts the "
        f"level it was heading for at {estimate}."
    )


def not_shown(study: Study) -> list[str]:
    """What a reader might expect from such a run and this one did not show, or cannot show."""
    return [
        *_missing_parts(study),
        *_paper_ordering(study),
        *_unresolved(study),
        *_no_ceiling(study),
        *_cut_short(study),
        *_limits(study),
    ]


def _missing_parts(study: Study) -> list[str]:
    said = [f"{name} has only just begun and is not shown." for name in study.just_begun]
    if not study.sft:
        said.append("There is no SFT run in this folder: regimes, and pure SFT at equal compute, are not shown.")
    if study.sft and not any(sft.losses for sft in study.sft):
        said.append(
            "No validation loss of SFT is known: nothing is said about regimes, nor about the loss and the ceiling."
        )
    for sft in study.sft:
        absent = [r for r in ("adaptive", "stable", "mild", "severe") if r not in {p.regime for p in sft.losses}]
        if sft.losses and absent:
            said.append(
                f"{_sft(sft)} was validated in no {' and no '.join(absent)} regime, so nothing is said about it."
            )
        if sft.not_finite:
            losses = "validation loss was" if sft.not_finite == 1 else "validation losses were"
            said.append(f"{sft.not_finite} {losses} not finite (nan or infinity) and cannot be placed in a regime.")
        if sft.scores == []:
            said.append(
                f"{_sft(sft)} itself was not scored (sft.eval_every is 0), so there is no pure SFT to compare with."
            )
    if not study.rl:
        said.append("No RL was run: nothing is said about RL, gains or ceilings.")
    elif not any(run.start_step == 0 for run in study.rl):
        said.append("Pure RL (without SFT before it) was not run, so SFT then RL is not compared with it.")
    said += [f"RL from {run.label} has no gain: {run.gain.reason}." for run in study.rl if run.gain.value is None]
    without = [run for run in study.rl if run.sft_equal.value is None and any(sft.scores for sft in study.sft)]
    if without and len(study.rl) > MOST_SENTENCES:
        return [
            *said,
            f"Pure SFT at the total compute of the RL run is not known for {len(without)} of the {len(study.rl)} runs.",
        ]
    said += [
        f"Pure SFT at the total compute of RL from {run.label} ({flops_text(run.eflops_total)}) is not shown: {run.sft_equal.reason}."
        for run in without
    ]
    return said


def _paper_ordering(study: Study) -> list[str]:
    """The paper's claim that overfitting, severe above all, costs RL its height, against this run's last scores.

    Of a study in which nothing but the start differs; where more does, it takes the means that the answers are made from.
    """
    if any(run.varies for run in study.rl):
        return []
    stable = _by_role(study, "stable")
    overfit = _by_role(study, "overfit")
    if not stable or not overfit:
        return []
    d = difference(_last(overfit), _last(stable))
    regime = f"{overfit.start_regime} overfit" if overfit.start_regime in ("mild", "severe") else "overfit"
    if d.value >= 0:
        said = (
            f"The paper finds that overfitting before the switch, severe overfitting above all, costs RL its height. Not here: RL from "
            f"the {regime} start (step {overfit.start_step}) ended {_points(d)} above RL from the stable start, not below it."
        )
        began = overfit.first.score - stable.first.score
        return [said + (f" It also began {began:.1f} points higher." if began > 0 else "")]
    below = f"RL from the {regime} start ended {_points(Measured(-d.value, d.se))} below RL from the stable start"
    if not _told_apart(d):
        return [f"{below}: the direction the paper reports, but within two standard errors."]
    return [f"{below}, as the paper reports; one run of each does not make it a rule."]


def _unresolved(study: Study) -> list[str]:
    ranked = _ranked(study)
    close = [run for run in ranked[1:] if not _told_apart(difference(_last(ranked[0]), _last(run)))]
    said = []
    if ranked and "seed" in ranked[0].varies:
        close = []  # the answers compare means over seeds
    if len(close) > MOST_SENTENCES:
        said.append(
            f"Which start ends highest is not settled: {len(close)} more ended within two standard errors of {ranked[0].label}."
        )
    elif close:
        said.append(
            f"Which start ends highest is not settled: {_listed([run.label for run in close])} ended within two standard errors of "
            f"{ranked[0].label}."
        )
    totals = [run.eflops_total for run in ranked]
    if len(totals) > 1 and max(totals) > 1.1 * min(totals):
        said.append(
            f"The runs did not spend the same total compute ({flops_text(min(totals))} to {flops_text(max(totals))}); their last "
            f"scores are compared as they are, later starts with more SFT behind them."
        )
    return said


def _no_ceiling(study: Study) -> list[str]:
    said = [f"No curve was fitted to RL from {run.label}: {run.fit_reason}." for run in study.rl if run.fit is None]
    for verdict, sentence in (
        (
            "too_short",
            f"No ceiling is estimated for RL from {{}}; a fit needs {MIN_POINTS}: more RL steps, or a smaller rl.eval_every, "
            "would help.",
        ),
        (
            "flat",
            "The curve of RL from {} is flat over the range that was run. That may mean that learning had not started yet; it says "
            "nothing about where it would end.",
        ),
        ("lower_bound", "The height at which RL from {} would level off is not identified: more RL steps are needed."),
        ("collapsed", "What RL from {} would have reached without its collapse is not known."),
    ):
        labels = [
            run.label + (f", which has {run.fit.n_used} scores" if verdict == "too_short" else "")
            for run in study.rl
            if run.fit is not None and run.fit.verdict == verdict
        ]
        said += (
            [sentence.format(label) for label in labels]
            if len(study.rl) <= MOST_SENTENCES
            else [sentence.format(_listed(labels))]
            if labels
            else []
        )
    return said


def _cut_short(study: Study) -> list[str]:
    shares = {run.label: run.counts.get("eval_truncated_share", 0.0) for run in study.rl}
    cut = [f"{100 * share:.0f} % in RL from {label}" for label, share in shares.items() if share > CUT_SHORT]
    if len(cut) > MOST_SENTENCES:
        cut = [f"up to {100 * max(shares.values()):.0f} %, in {len(cut)} of {len(shares)} RL runs"]
    return (
        [
            f"What longer responses would have scored: at the last scoring some were cut at the length limit ({_listed(cut)}), and without "
            f"a final answer they count as wrong."
        ]
        if cut
        else []
    )


def _limits(study: Study) -> list[str]:
    said = []
    most = _longest(study)
    if 0 < most < PAPER_LEAST_EFLOPS:
        said.append(
            f"Size: the longest path here spent {flops_text(most)}; the paper's smallest SFT checkpoint alone spent "
            f"{PAPER_LEAST_EFLOPS} EFLOPs, {_times(PAPER_LEAST_EFLOPS / most)} as much, on a model of 7 billion parameters. "
            f"What holds here need not hold there, nor the reverse."
        )
    seeds = sorted({run.seed for run in study.runs if run.config_text})
    if len(seeds) == 1:
        said.append(
            f"Each run was made once (seed {seeds[0]}). The standard errors count the sampling of test problems only; another seed "
            f"may move a score by more than that."
        )
    elif seeds:
        said.append(
            f"There are {len(seeds)} seeds. The standard errors in words and tables are of single runs, and count the sampling of "
            f"test problems only; the chart of the scores shows the means over seeds."
        )
    return said


def _ranked(study: Study) -> list[RLRun]:
    """Runs with a gain, the highest last score first."""
    return sorted((run for run in study.rl if run.gain.value is not None), key=lambda run: -run.last.score)


def _by_role(study: Study, role: str) -> RLRun | None:
    return next((run for run in study.rl if run.role == role and run.last), None)


def _last(run: RLRun) -> Measured:
    return Measured(run.last.score, run.last.score_se)


def _told_apart(d: Measured) -> bool:
    return abs(d.value) > 2 * d.se


def _percent(value: float, se: float) -> str:
    return f"{value:.1f} % (standard error {se:.1f})"


def _points(d: Measured) -> str:
    return f"{d.value:.1f} points (standard error {d.se:.1f})"


def _from_to(run: RLRun) -> str:
    return (
        f"from {run.first.score:.1f} % to {run.last.score:.1f} %, a change of {run.gain.value:+.1f} points "
        f"(standard error {run.gain.se:.1f})"
    )


def _longest_sft(study: Study) -> float:
    return max((run.end.eflops_sft for run in study.sft if run.end), default=0.0)


def _longest(study: Study) -> float:
    """EFLOPs of training on the longest path from the start of SFT to the end of a run."""
    return max([_longest_sft(study), *(run.eflops_total for run in study.rl)])


def _listed(items: list[str]) -> str:
    """a, b and c"""
    return items[0] if len(items) == 1 else f"{', '.join(items[:-1])} and {items[-1]}"


def _times(factor: float) -> str:
    for power, word in ((12, "trillion"), (9, "billion"), (6, "million"), (3, "thousand")):
        if factor >= 10**power:
            return f"{factor / 10**power:.3g} {word} times"
    return f"{factor:.2g} times"
