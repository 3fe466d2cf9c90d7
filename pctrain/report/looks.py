"""How runs look in every figure and chart: colours, markers, and text for compute and ceilings.

Colours are Okabe and Ito's (safe for the common kinds of color blindness), each with a lighter form for dark pages.
Marker shapes and labels repeat what colors say. Runs are colored by set if sets differ, else by algorithm or start.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeGuard, TypeVar

if TYPE_CHECKING:  # importing it would import SciPy
    from pctrain.report.study_data import FittedRun, RLRun, Study

Item = TypeVar("Item")

# name: (on a light page, on a dark page)
PALETTE = {
    "ink": ("#3d444d", "#d5dae0"),
    "blue": ("#0072b2", "#56a8e0"),
    "green": ("#009e73", "#2fc497"),
    "vermillion": ("#d55e00", "#ff8f4a"),
    "purple": ("#cc79a7", "#e39cc4"),
    "orange": ("#e69f00", "#f2bb44"),
    "sky": ("#56b4e9", "#8fd0f7"),
    "grey": ("#6e7781", "#a3adb8"),
}
REGIME_COLOURS = {
    "adaptive": "#56b4e9",
    "stable": "#009e73",
    "mild": "#f0c419",
    "severe": "#d55e00",
    "transient": "#8c959f",
}
ROLE_COLOURS = {"early": "blue", "stable": "green", "overfit": "vermillion"}
OTHER_COLOURS = ["purple", "orange", "blue", "green", "vermillion", "sky"]
SET_COLOURS = ["blue", "vermillion", "green", "purple", "orange", "sky"]
MARKERS = ("o", "s", "^", "D", "v", "P")  # of matplotlib; charts.js.j2 has those of plotly in the same order
INK = "#1f2328"
MUTED = "#656d76"
GRID = "#e4e7eb"
BASE = "#c3cad2"
STYLE = {  # for matplotlib.rc_context
    "font.family": "DejaVu Sans",
    "font.size": 10,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": "#9aa1a9",
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "figure.facecolor": "white",
    "axes.facecolor": "white",
    "axes.titlelocation": "left",
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlepad": 10,
    "legend.frameon": False,
    "hatch.linewidth": 0.7,
    "savefig.dpi": 200,
    "text.parse_math": False,  # names come from files, so $ is only a dollar sign
}
PHASE_NAMES = {
    "sft_update": "SFT updates",
    "rollout": "Rollouts",
    "rollout_rejected": "Rollouts rejected",
    "logprob": "Log-prob passes",
    "reference": "Reference passes",
    "expert": "Expert's tokens",
    "rl_update": "RL updates",
    "validation": "Validation",
    "evaluation": "Evaluation",
}


@dataclass(frozen=True)
class Look:
    """The look of a run."""

    colour: str  # in a chart of all sets
    alone: str  # in a chart of this run's set only, where colors need not separate sets
    marker: int  # index into MARKERS


def run_looks(study: Study) -> dict[str, Look]:
    """Return `{run.name: Look}`. Seeds of an experiment look alike; RL without SFT is grey if sets have the colours."""
    sets = _distinct(run.set for run in study.runs if run.set)
    many_sets = len(sets) > 1
    starts = {
        name: _distinct(run.start_step for run in study.rl if run.set == name) for name in {run.set for run in study.rl}
    }
    looks = {run.name: Look(_pick(SET_COLOURS, sets, run.set) if many_sets else "ink", "ink", 0) for run in study.sft}
    for run in study.rl:
        alone = "grey" if many_sets and run.set not in sets else _colour_in_set(study, run)
        of_set = _pick(SET_COLOURS, sets, run.set) if run.set in sets else alone
        looks[run.name] = Look(
            of_set if many_sets else alone, alone, starts[run.set].index(run.start_step) % len(MARKERS)
        )
    return looks


def flop_scale(eflops: float) -> tuple[float, str]:
    """Return (factor, unit) so that `eflops * factor` reads as 1 to 999 of `unit`."""
    for power, prefix in ((21, "Z"), (18, "E"), (15, "P"), (12, "T"), (9, "G"), (6, "M"), (3, "k")):
        if eflops >= 10.0 ** (power - 18):
            return 10.0 ** (18 - power), prefix + "FLOPs"
    return 1e18, "FLOPs"


def flops_text(eflops: float) -> str:
    """Return an amount of compute with a readable unit, such as "7.45 TFLOPs"."""
    factor, unit = flop_scale(eflops)
    return f"{eflops * factor:.3g} {unit}"


def shows_ceiling(run: RLRun) -> TypeGuard[FittedRun]:
    """Return True if the run has a fit that says something about a ceiling; `flat` and `too_short` do not."""
    return run.fit is not None and run.fit.verdict in ("identified", "lower_bound", "collapsed")


def ceiling_text(run: RLRun) -> str:
    """Return two short lines on the fit of a run, for the side of a bar."""
    if run.fit is None:
        return f"no fit\n{run.fit_reason}"
    fit = run.fit
    if fit.verdict == "identified":
        return f"identified\nA_post {fit.a_post:.1f} ({fit.a_post_low:.1f} to {fit.a_post_high:.1f})"
    if fit.verdict == "lower_bound":
        return f"lower bound only\nA_post at least {fit.a_post_low:.1f}"
    if fit.verdict == "collapsed":
        return f"collapsed\nbefore that {fit.a_post:.1f} ({fit.a_post_low:.1f} to {fit.a_post_high:.1f})"
    if fit.verdict == "flat":
        return "flat: no ceiling\nno rise to fit yet"
    return f"too short: no ceiling\n{fit.n_used} scores"


def _colour_in_set(study: Study, run: RLRun) -> str:
    """Return the colour of a run within its set: by algorithm if these differ, else by role, else by start."""
    algorithms = _distinct(other.algorithm for other in study.rl)
    if len(algorithms) > 1:
        return _pick(SET_COLOURS, algorithms, run.algorithm)
    if run.role in ROLE_COLOURS:
        return ROLE_COLOURS[run.role]
    fellows = [other for other in study.rl if other.set == run.set]
    free = [colour for colour in OTHER_COLOURS if colour not in {ROLE_COLOURS.get(other.role) for other in fellows}]
    return _pick(
        free or OTHER_COLOURS,
        _distinct(other.start_step for other in fellows if other.role not in ROLE_COLOURS),
        run.start_step,
    )


def _distinct(values: Iterable[Item]) -> list[Item]:
    return list(dict.fromkeys(values))


def _pick(colours: Sequence[str], keys: Sequence[Item], key: Item) -> str:
    return colours[keys.index(key) % len(colours)]
