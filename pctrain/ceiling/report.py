"""`pctrain report RUN`: what a study or a run showed, and what it did not, as one HTML page, PNG figures and study.json.

Every sentence is computed from the numbers of this run, with its standard error; nothing is taken from the paper but the claims that
it is compared with. The page stands alone: it opens from disk, loads nothing, and treats all text from files as hostile.
"""

from __future__ import annotations

import json
import platform
from importlib import metadata
from pathlib import Path
from typing import Any

import jinja2
from plotly.offline import get_plotlyjs
from rich import box
from rich.table import Table
from rich.text import Text

from pctrain.ceiling import figures
from pctrain.ceiling.figures import first_sft, flop_scale, flops_text
from pctrain.ceiling.fit import MIN_POINTS
from pctrain.ceiling.ledger import PHASES
from pctrain.ceiling.reading import read_study
from pctrain.ceiling.study_data import GAIN_FORMULA, Estimate, RLRun, SFTRun, Study, as_json, difference
from pctrain.durable import write_beside
from pctrain.progress import make_console

PACKAGES = ("pctrain", "numpy", "scipy", "matplotlib", "plotly", "torch", "megatron-core", "vllm", "transformers", "math-verify")
PAPER_LEAST_EFLOPS = 0.6  # the smallest SFT checkpoint of the paper's table (S1K, 62 steps, Qwen2.5-7B), before any RL
CUT_SHORT = 0.05  # share of responses cut at the length limit from which the report says so


def main(run_dir: Path | str) -> Path:
    """Write `RUN/report/` (report.html, figures/*.png, study.json), print the summary table; returns the report folder."""
    folder = Path(run_dir)
    study = read_study(folder)
    values = contents(study)
    pngs = figures.draw_all(study)
    page = render(study, values, sorted(pngs))

    out = folder / "report"
    (out / "figures").mkdir(parents=True, exist_ok=True)
    for name, png in pngs.items():
        write_beside(out / "figures" / name, png)
    write_beside(out / "study.json", json.dumps(values, indent=1, ensure_ascii=False, allow_nan=False) + "\n")
    write_beside(out / "report.html", page)
    _print_summary(study, values, out, len(pngs))
    return out


def contents(study: Study) -> dict[str, Any]:
    """What study.json holds."""
    return as_json(study) | {"findings": findings(study), "not_shown": not_shown(study), "versions": versions()}


# -- sentences ---------------------------------------------------------------------------------------------------------------------

def headline(study: Study) -> str:
    """The one sentence at the top."""
    ranked = _ranked(study)
    if not ranked:
        sft = first_sft(study)
        best = max(sft.scores, key=lambda p: p.score, default=None) if sft else None
        if best:
            return f"SFT alone reached {_percent(best.score, best.score_se)} at step {best.step}; no RL run has two scores yet."
        return "No run here has been scored twice yet."
    if len(ranked) == 1:
        return f"RL from {ranked[0].label} took the score {_from_to(ranked[0])}."
    lead = difference(_last(ranked[0]), _last(ranked[1]))
    return (f"RL from {ranked[0].label} ended highest, at {ranked[0].last.score:.1f} %, {_points(lead)} above {ranked[1].label}"
            + (": more than two standard errors." if _told_apart(lead) else
               ": within two standard errors, so this run does not settle which start is better."))


def findings(study: Study) -> list[str]:
    """What the numbers of this run say."""
    return [*_what_was_run(study), *_loss_findings(first_sft(study)), *(_gain_sentence(run) for run in study.rl if run.gain.value is not None),
            *_best_switch(study), *_against_sft(study), *(_ceiling_sentence(run) for run in study.rl if figures.shows_ceiling(run))]


def _what_was_run(study: Study) -> list[str]:
    said = []
    sft = first_sft(study)
    if sft and sft.points:
        last = sft.points[-1]
        said.append(f"SFT ran to step {last.step}, {flops_text(last.eflops_sft)} of training compute.")
    if study.rl:
        algorithms = _listed(sorted({run.algorithm for run in study.rl}))
        said.append(f"RL ({algorithms}) was started from {_listed([run.label for run in study.rl])}.")
    return said


def _loss_findings(sft: SFTRun | None) -> list[str]:
    if sft is None or sft.best is None:
        return []
    seen = list(dict.fromkeys(p.regime for p in sft.losses))
    last = sft.losses[-1]
    rise = last.val_loss / sft.best.val_loss - 1
    return [f"The validation loss was lowest at step {sft.best.step} ({sft.best.val_loss:.3f} nats per token); at the end it was "
            f"{last.val_loss:.3f}, {100 * rise:.0f} % above that. Regimes in order of appearance: {_listed(seen)}."]


def _gain_sentence(run: RLRun) -> str:
    if _told_apart(run.gain):
        weight = "more than two standard errors."
    else:
        weight = "within two standard errors, so it cannot be told from no change."
    at = f", in the {run.start_regime} regime," if run.start_regime else ""
    return f"RL from {run.label}{at} took the score {_from_to(run)}, {weight}"


def _best_switch(study: Study) -> list[str]:
    ranked = _ranked(study)
    if len(ranked) < 2:
        return []
    lead = difference(_last(ranked[0]), _last(ranked[1]))
    gains = sorted(ranked, key=lambda run: -run.gain.value)
    clear = "and that difference is more than two standard errors" if _told_apart(lead) else \
        "but that difference is within two standard errors: this run does not settle which of the two is the better start"
    return [f"The highest last score came from {ranked[0].label}, {_points(lead)} above {ranked[1].label}, {clear}. "
            f"The largest gain was that from {gains[0].label}, {_points(gains[0].gain)}."]


def _against_sft(study: Study) -> list[str]:
    said = []
    for run in study.rl:
        if run.last and run.sft_equal.value is not None:
            lead = difference(_last(run), run.sft_equal)
            clear = "more than" if _told_apart(lead) else "within"
            said.append(f"At equal total compute ({flops_text(run.eflops_total)}) pure SFT scored "
                        f"{_percent(run.sft_equal.value, run.sft_equal.se)}; SFT then RL from {run.label} was {abs(lead.value):.1f} points "
                        f"{'higher' if lead.value >= 0 else 'lower'} (standard error {lead.se:.1f}), {clear} two standard errors.")
    return said


def _ceiling_sentence(run: RLRun) -> str:
    fit = run.fit
    estimate = f"{fit.a_post:.1f} %, 90 % interval {fit.a_post_low:.1f} to {fit.a_post_high:.1f}"
    if fit.verdict == "identified":
        return (f"Ceiling of RL from {run.label}: {estimate} (identified); "
                f"plasticity PL_rl {fit.pl_rl:.1f} points above P_sft {fit.p_sft:.1f} %.")
    if fit.verdict == "lower_bound":
        return (f"Ceiling of RL from {run.label}: only a lower bound. It is above {fit.a_post_low:.1f} % with 95 % probability under the "
                f"fit's model; the curve does not say how far above.")
    return (f"RL from {run.label} collapsed after {flops_text(fit.collapsed_at)} of RL. The fit uses the points before it and puts the "
            f"level it was heading for at {estimate}.")


def not_shown(study: Study) -> list[str]:
    """What a reader might expect from such a run and this one did not show, or cannot show."""
    return [*_missing_parts(study), *_paper_ordering(study), *_unresolved(study), *_no_ceiling(study), *_cut_short(study), *_limits(study)]


def _missing_parts(study: Study) -> list[str]:
    said = []
    sft = first_sft(study)
    if sft is None:
        said.append("There is no SFT run in this folder: regimes, and pure SFT at equal compute, are not shown.")
    else:
        absent = [r for r in ("adaptive", "stable", "mild", "severe") if r not in {p.regime for p in sft.losses}]
        if absent:
            said.append(f"The SFT run was validated in no {' and no '.join(absent)} regime, so nothing is said about it.")
        if sft.not_finite:
            losses = "validation loss was" if sft.not_finite == 1 else "validation losses were"
            said.append(f"{sft.not_finite} {losses} not finite (nan or infinity) and cannot be placed in a regime.")
        if sft.scores == []:
            said.append("The SFT run itself was not scored (sft.eval_every is 0), so there is no pure SFT to compare with.")
    if not study.rl:
        said.append("No RL was run: nothing is said about RL, gains or ceilings.")
    elif not any(run.start_step == 0 for run in study.rl):
        said.append("Pure RL (without SFT before it) was not run, so SFT then RL is not compared with it.")
    said += [f"RL from {run.label} has no gain: {run.gain.reason}." for run in study.rl if run.gain.value is None]
    without = [run for run in study.rl if run.sft_equal.value is None and sft and sft.scores]
    said += [f"Pure SFT at the total compute of RL from {run.label} ({flops_text(run.eflops_total)}) is not shown: {run.sft_equal.reason}."
             for run in without]
    return said


def _paper_ordering(study: Study) -> list[str]:
    """The paper's claim that overfitting, severe above all, costs RL its height, against this run's last scores."""
    stable = _by_role(study, "stable")
    overfit = _by_role(study, "overfit")
    if not stable or not overfit:
        return []
    d = difference(_last(overfit), _last(stable))
    regime = f"{overfit.start_regime} overfit" if overfit.start_regime in ("mild", "severe") else "overfit"
    if d.value >= 0:
        said = (f"The paper finds that overfitting before the switch, severe overfitting above all, costs RL its height. Not here: RL from "
                f"the {regime} start (step {overfit.start_step}) ended {_points(d)} above RL from the stable start, not below it.")
        began = overfit.first.score - stable.first.score
        return [said + (f" It also began {began:.1f} points higher." if began > 0 else "")]
    below = f"RL from the {regime} start ended {_points(Estimate(-d.value, d.se))} below RL from the stable start"
    if not _told_apart(d):
        return [f"{below}: the direction the paper reports, but within two standard errors."]
    return [f"{below}, as the paper reports; one run of each does not make it a rule."]


def _unresolved(study: Study) -> list[str]:
    ranked = _ranked(study)
    close = [run for run in ranked[1:] if not _told_apart(difference(_last(ranked[0]), _last(run)))]
    said = []
    if close:
        said.append(f"Which start ends highest is not settled: {_listed([run.label for run in close])} ended within two standard errors of "
                    f"{ranked[0].label}.")
    totals = [run.eflops_total for run in ranked]
    if len(totals) > 1 and max(totals) > 1.1 * min(totals):
        said.append(f"The runs did not spend the same total compute ({flops_text(min(totals))} to {flops_text(max(totals))}); their last "
                    f"scores are compared as they are, later starts with more SFT behind them.")
    return said


def _no_ceiling(study: Study) -> list[str]:
    said = []
    for run in study.rl:
        if run.fit is None:
            said.append(f"No curve was fitted to RL from {run.label}: {run.fit_reason}.")
        elif run.fit.verdict == "too_short":
            said.append(f"No ceiling is estimated for RL from {run.label}: {run.fit.n_used} scores are too few ({MIN_POINTS} are needed); "
                        f"more RL steps, or a smaller rl.eval_every, would help.")
        elif run.fit.verdict == "flat":
            said.append(f"The curve of RL from {run.label} is flat over the range that was run. That may mean that learning had not "
                        f"started yet; it says nothing about where it would end.")
        elif run.fit.verdict == "lower_bound":
            said.append(f"The height at which RL from {run.label} would level off is not identified: more RL steps are needed.")
        elif run.fit.verdict == "collapsed":
            said.append(f"What RL from {run.label} would have reached without its collapse is not known.")
    return said


def _cut_short(study: Study) -> list[str]:
    shares = {run.label: run.counts.get("eval_truncated_share", 0.0) for run in study.rl}
    cut = [f"{100 * share:.0f} % in RL from {label}" for label, share in shares.items() if share > CUT_SHORT]
    return [f"What longer responses would have scored: at the last scoring some were cut at the length limit ({_listed(cut)}), and without "
            f"a final answer they count as wrong."] if cut else []


def _limits(study: Study) -> list[str]:
    said = []
    most = _longest(study)
    if 0 < most < PAPER_LEAST_EFLOPS:
        said.append(f"Size: the longest path here spent {flops_text(most)}; the paper's smallest SFT checkpoint alone spent "
                    f"{PAPER_LEAST_EFLOPS} EFLOPs, {_times(PAPER_LEAST_EFLOPS / most)} as much, on a model of 7 billion parameters. "
                    f"What holds here need not hold there, nor the reverse.")
    seeds = sorted({run.config["run"]["seed"] for run in study.runs if "seed" in run.config.get("run", {})})
    if seeds:
        said.append(f"Each run was made once (seed {', '.join(map(str, seeds))}). The standard errors count the sampling of test problems "
                    f"only; another seed may move a score by more than that.")
    return said


def _ranked(study: Study) -> list[RLRun]:
    """Runs with a gain, the highest last score first."""
    return sorted((run for run in study.rl if run.gain.value is not None), key=lambda run: -run.last.score)


def _by_role(study: Study, role: str) -> RLRun | None:
    return next((run for run in study.rl if run.role == role and run.last), None)


def _last(run: RLRun) -> Estimate:
    return Estimate(run.last.score, run.last.score_se)


def _told_apart(d: Estimate) -> bool:
    return abs(d.value) > 2 * d.se


def _percent(value: float, se: float) -> str:
    return f"{value:.1f} % (standard error {se:.1f})"


def _points(d: Estimate) -> str:
    return f"{d.value:.1f} points (standard error {d.se:.1f})"


def _from_to(run: RLRun) -> str:
    return (f"from {run.first.score:.1f} % to {run.last.score:.1f} %, a change of {run.gain.value:+.1f} points "
            f"(standard error {run.gain.se:.1f})")


def _longest_sft(study: Study) -> float:
    return max((p.eflops_sft for run in study.sft for p in run.points), default=0.0)


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


# -- the page ----------------------------------------------------------------------------------------------------------------------

def render(study: Study, values: dict[str, Any], pngs: list[str]) -> str:
    """report.html: one string, everything inside. `values` is study.json."""
    here = Path(__file__).parent
    environment = jinja2.Environment(loader=jinja2.FileSystemLoader(here), autoescape=True, undefined=jinja2.StrictUndefined,
                                     trim_blocks=True, lstrip_blocks=True)
    environment.policies["json.dumps_kwargs"] = {"sort_keys": False, "allow_nan": False}  # phases and regimes keep their order
    environment.filters |= {"flops": lambda value: flops_text(value / 1e18), "eflops": flops_text}
    total = values["ledger"]
    phases = [phase for phase in PHASES if phase in total]
    flops = [row[key] / 1e18 for row in total.values() for key in ("paper_flops", "exact_flops")]
    charts = {key: values[key] for key in ("rl", "ledger")} | {
        "sft": values["sft"][0] if values["sft"] else None,
        "colours": figures.run_colours(study.rl), "labels": [run.label for run in study.rl], "regimes": figures.REGIME_COLOURS,
        "ceilings": [figures.ceiling_text(run).replace("\n", ", ") for run in study.rl],
        "shows_ceiling": [figures.shows_ceiling(run) for run in study.rl],
        "phases": {phase: figures.PHASES[phase] for phase in phases},
        "measuring": [phase for phase in phases if PHASES[phase].axis is None],
        "scales": {"sft": flop_scale(_longest_sft(study)), "total": flop_scale(_longest(study)),
                   "ledger": flop_scale(max(flops, default=0.0))}}
    return environment.get_template("report.html.j2").render(
        study=study, sft=first_sft(study), values=values, charts=charts, headline=headline(study), gain_formula=GAIN_FORMULA, pngs=pngs, phases=phases,
        phase_names=figures.PHASES, measuring=charts["measuring"], ceiling_text=figures.ceiling_text, plotly=get_plotlyjs())


def versions() -> dict[str, str]:
    """Packages as installed where the report is written; read from their metadata, none is imported."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def _print_summary(study: Study, values: dict[str, Any], out: Path, n_figures: int) -> None:
    console = make_console()
    title = Text(f"{study.name}: RL from each start, scores in percent ± standard error")
    table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD)
    for name in ("start", "regime", "first", "last", "gain", "SFT alone*", "fit"):
        table.add_column(name, justify="left" if name in ("start", "regime", "fit") else "right", no_wrap=name != "fit")
    for run in study.rl:
        first, last, alone = ("-" if value is None else f"{value:.1f}" for value in (
            run.first and run.first.score, run.last and run.last.score, run.sft_equal.value))
        gain = "-" if run.gain.value is None else f"{run.gain.value:+.1f} ± {run.gain.se:.1f}"
        table.add_row(run.label, run.start_regime or "-", first, last, gain, alone, figures.ceiling_text(run).replace("\n", ", "))
    if study.rl:
        console.print(table)
        console.print("* score of the SFT run at the same total training compute", style="dim")
    console.print(headline(study), highlight=False, markup=False)
    console.print(f"{len(values['not_shown'])} things this run does not show are listed in the report.", highlight=False)
    console.print(f"Wrote {out / 'report.html'}, {out / 'study.json'} and {n_figures} figures in {out / 'figures'}.", highlight=False,
                  markup=False, soft_wrap=True)
