"""Bars of the score before RL and of what RL adds (figure 3 of arXiv 2512.11470)."""

from __future__ import annotations

from typing import Any

from pctrain.ceiling.fit import Fit
from pctrain.report.charts.chart import Chart, run_name, set_names
from pctrain.report.looks import Look, ceiling_text, run_looks, shows_ceiling
from pctrain.report.study_data import FittedRun, ScoredRun, Study

CAPTION = (
    "As in figure 3 of arXiv 2512.11470. Gray: P_sft, the score at the start of RL. On top of it: "
    "PL_rl = A_post - P_sft, the plasticity that the fit estimates. The line is the 90% interval of A_post. Pale bars "
    "are not identified; an arrow means that only the lower end of the interval is known. An empty outline is the "
    "measured gain of a run whose fit gives no ceiling."
)
FIT_FIELDS = ("a_post", "a_post_low", "a_post_high", "pl_rl", "c_mid", "b", "eps")
COLUMNS = (
    "set",
    "seed",
    "start_step",
    "algorithm",
    "eflops_sft",
    "regime",
    "p_sft",
    "verdict",
    *FIT_FIELDS,
    "last_score",
)


def build(study: Study) -> Chart | None:
    """Build the chart, or return None if no run was scored at its start."""
    runs = [(run, run.p_sft.value) for run in study.scored]
    starts = [(run, p_sft) for run, p_sft in runs if p_sft is not None]
    if not starts:
        return None
    starts.sort(key=lambda start: (start[0].set, start[0].start_step, start[0].algorithm, start[0].seed))
    looks = run_looks(study)
    lowest = min(p_sft for _, p_sft in starts)
    spec = {
        "x": "score (% of test problems)",
        "bars": [_bar(run, p_sft, looks[run.name]) for run, p_sft in starts],
        "sets": set_names(study),
        "begin": 10.0 * int((lowest - 15) / 10) if lowest > 40 else 0.0,
    }
    rows = [_row(run, p_sft) for run, p_sft in starts]
    return Chart("ceilings", "Score before RL, and what RL adds", CAPTION, spec, COLUMNS, rows)


def _ceiling_fit(run: ScoredRun) -> Fit | None:
    """Return the fit if its verdict says something about a ceiling."""
    return run.fit if isinstance(run, FittedRun) and shows_ceiling(run) else None


def _bar(run: ScoredRun, p_sft: float, look: Look) -> dict[str, Any]:
    fit = _ceiling_fit(run)
    ceiling = None
    if fit is not None:
        ceiling = {"a": fit.a_post, "low": fit.a_post_low, "high": fit.a_post_high, "verdict": fit.verdict}
    return {
        "name": run_name(run),
        "set": run.set,
        "colour": look.colour,
        "alone": look.alone,
        "p_sft": p_sft,
        "regime": run.start_regime,
        "text": ceiling_text(run).replace("\n", ", "),
        "solid": fit is not None and fit.verdict == "identified",
        "ceiling": ceiling,
        "measured": run.last.score,
    }


def _row(run: ScoredRun, p_sft: float) -> list[Any]:
    fit = _ceiling_fit(run)
    start = [run.set, run.seed, run.start_step, run.algorithm, run.eflops_sft, run.start_regime, p_sft]
    fields = [getattr(fit, name) for name in FIT_FIELDS] if fit is not None else [""] * len(FIT_FIELDS)
    return [*start, run.fit.verdict if run.fit is not None else "", *fields, run.last.score]
