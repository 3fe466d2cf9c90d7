"""The numbers of every chart of the report: what the page draws (`spec`, JSON) and what the chart's CSV holds, made from a `Study`.

A spec names colours by their name in looks.PALETTE and gives compute in a readable unit; a CSV has EFLOPs and percent throughout.
charts.js.j2 has a drawing function for every name here and computes nothing but positions.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from pctrain.ceiling.correlation import correlate
from pctrain.compute.ledger import PHASES
from pctrain.report.held_out import HeldOut
from pctrain.report.looks import PHASE_NAMES, Look, ceiling_text, flop_scale, run_looks, shows_ceiling
from pctrain.report.study_data import RLPoint, RLRun, SFTRun, Study

LEDGER_METRICS = (
    ("exact_flops", "exact FLOPs"),
    ("paper_flops", "FLOPs by the paper's formulas"),
    ("tokens", "tokens"),
    ("seconds", "wall seconds"),
    ("device_seconds", "device seconds"),
)


@dataclass(frozen=True)
class Chart:
    """`name`: of its drawing function, of its place in the page and of its files (NAME.csv, NAME.png)."""

    name: str
    title: str
    caption: str
    spec: dict[str, Any]
    columns: tuple[str, ...]
    rows: list[list[Any]]

    def csv(self) -> str:
        out = io.StringIO()
        writer = csv.writer(out, lineterminator="\n")
        writer.writerows([[_plain_cell(value) for value in row] for row in (self.columns, *self.rows)])
        return out.getvalue()


def build(study: Study, held: dict[str, HeldOut | None]) -> list[Chart]:
    """The charts that the study has data for, in the order of the page. `held`: by name of the run."""
    made: list[Chart | None] = [
        _validation_loss(study),
        _score(study, held),
        _ceilings(study),
        _ceiling_against_loss(study),
        _benchmarks(study),
        _compute(study),
    ]
    return [chart for chart in made if chart is not None]


def sft_name(run: SFTRun) -> str:
    return f"SFT on {run.label}" if run.label else "pure SFT"


def rl_name(run: RLRun) -> str:
    return f"RL from {run.label}"


def group_name(run: SFTRun | RLRun) -> str:
    """The name without the seed: the runs of one experiment, which a reader looks at together."""
    run = replace(run, varies=run.varies - {"seed"})
    return rl_name(run) if isinstance(run, RLRun) else sft_name(run)


# -- validation loss ---------------------------------------------------------------------------------------------------------------


def _validation_loss(study: Study) -> Chart | None:
    runs = [run for run in study.sft if run.losses]
    if not runs:
        return None
    looks = run_looks(study)
    factor, unit = flop_scale(max(run.losses[-1].eflops_sft for run in runs))
    rows = [
        [run.set, run.seed, p.step, p.eflops_sft, p.val_loss, p.val_loss_se, p.regime]
        for run in runs
        for p in run.losses
    ]
    spec = {
        "x": f"SFT compute ({unit})",
        "y": "validation loss (nats per token)",
        "series": [_identity(run, looks, runs) | _loss_series(study, run, looks, factor) for run in runs],
    }
    delta, delta2 = (f"{100 * value:.3g}" for value in (runs[0].delta, runs[0].delta2))
    caption = (
        f"Stable is within {delta} % of the minimum (the ring), severe from {delta2} % above it on; adaptive comes before the first "
        f"stable point, mild and severe after the last; transient points lie between stable ones but outside the band. The dotted "
        f"lines are these two bounds. Filled markers show where RL was started."
    )
    return Chart(
        "validation_loss",
        "Validation loss along SFT",
        caption,
        spec,
        ("set", "seed", "step", "eflops_sft", "val_loss", "val_loss_se", "regime"),
        rows,
    )


def _loss_series(study: Study, run: SFTRun, looks: dict[str, Look], factor: float) -> dict[str, Any]:
    best = run.best
    starts = []
    for rl in _first_of_starts(study, run):
        near = min(run.losses, key=lambda p: abs(p.eflops_sft - rl.eflops_sft))
        starts.append(
            {
                "name": group_name(rl),
                "x": rl.eflops_sft * factor,
                "y": near.val_loss,
                "colour": looks[rl.name].alone,
                "marker": looks[rl.name].marker,
            }
        )
    return {
        "x": [p.eflops_sft * factor for p in run.losses],
        "y": [p.val_loss for p in run.losses],
        "se": [p.val_loss_se for p in run.losses],
        "steps": [p.step for p in run.losses],
        "regimes": [p.regime for p in run.losses],
        "bands": [{"from": b["from"] * factor, "to": b["to"] * factor, "regime": b["regime"]} for b in run.bands()],
        "minimum": {"x": best.eflops_sft * factor, "y": best.val_loss, "step": best.step},
        "bounds": [best.val_loss * (1 + run.delta), best.val_loss * (1 + run.delta2)],
        "starts": starts,
    }


# -- score against compute ---------------------------------------------------------------------------------------------------------


def _score(study: Study, held: dict[str, HeldOut | None]) -> Chart | None:
    sft = [run for run in study.sft if run.scores]
    rl = [run for run in study.rl if run.points]
    if not sft and not rl:
        return None
    looks = run_looks(study)
    factor, unit = _scale(
        [(run.set, run.scores[-1].eflops_sft) for run in sft] + [(run.set, run.eflops_total) for run in rl]
    )
    series = [_sft_scores(run, factor) | _identity(run, looks, sft) for run in sft]
    series += [_rl_scores(run, factor, held[run.name]) | _identity(run, looks, rl) for run in rl]
    rows = [
        ["sft", run.set, run.seed, "", "", p.step, p.eflops_sft, 0.0, p.score, p.score_se, "", "", "", "", ""]
        for run in sft
        for p in run.scores
    ]
    for run in rl:
        rows += _rl_rows(run, held[run.name])
    spec = {
        "x": f"training compute, SFT + RL ({unit})",
        "x_joint": f"RL compute from the joint ({unit})",
        "y": "score (% of test problems)",
        "unit": unit,
        "series": series,
        "sets": _sets(study),
        "means": [mean for runs in (sft, rl) for mean in _means(runs, looks, factor)],
    }
    caption = (
        "Points are measured scores; hover tells their standard errors. Lines of RL runs are the fitted sigmoid with the 90 % "
        "interval of the curve, solid where the ceiling is identified, dashed where not. Open diamonds: pure SFT at the total "
        "compute of the run. “Held out” fits the first 71 % of the points of a run alone and shows the rest, hollow, against what "
        "it foretells: the 90 % interval of a measured score. Evaluation costs no x."
    )
    return Chart(
        "score_vs_compute",
        "Score against training compute",
        caption,
        spec,
        (
            "kind",
            "set",
            "seed",
            "start_step",
            "algorithm",
            "step",
            "eflops_sft",
            "eflops_rl",
            "score",
            "score_se",
            "fit",
            "fit_low",
            "fit_high",
            "held_out",
            "predicted",
        ),
        rows,
    )


def _sft_scores(run: SFTRun, factor: float) -> dict[str, Any]:
    return {
        "kind": "sft",
        "joint": 0.0,
        "x": [p.eflops_sft * factor for p in run.scores],
        "y": [p.score for p in run.scores],
        "se": [p.score_se for p in run.scores],
        "steps": [p.step for p in run.scores],
    }


def _rl_scores(run: RLRun, factor: float, held: HeldOut | None) -> dict[str, Any]:
    curve = run.curve()
    equal = run.sft_equal
    return {
        "kind": "rl",
        "joint": run.eflops_sft * factor,
        "x": [p.eflops_rl * factor for p in run.points],
        "y": [p.score for p in run.points],
        "se": [p.score_se for p in run.points],
        "steps": _rl_steps(run, run.points),
        "fit": curve and _scaled(curve, factor) | {"identified": run.fit.verdict == "identified"},
        "verdict": ceiling_text(run).replace("\n", ", "),
        "held": held and _scaled(held.curve, factor) | {"seen": held.seen, "rmse": held.rmse, "outside": held.outside},
        "equal": None if equal.value is None else {"y": equal.value, "se": equal.se},
    }


def _identity(run: SFTRun | RLRun, looks: dict[str, Look], fellows: Sequence[SFTRun | RLRun]) -> dict[str, Any]:
    """Whose a series is. `seeded`: one of several that differ in the seed alone; `first` of them."""
    group = group_name(run)
    same = [other for other in fellows if group_name(other) == group]
    look = looks[run.name]
    return {
        "name": rl_name(run) if isinstance(run, RLRun) else sft_name(run),
        "group": group,
        "set": run.set,
        "colour": look.colour,
        "alone": look.alone,
        "marker": look.marker,
        "seeded": len(same) > 1,
        "first": run is same[0],
    }


def _means(runs: Sequence[SFTRun] | Sequence[RLRun], looks: dict[str, Look], factor: float) -> list[dict[str, Any]]:
    """Mean over seeds, plus and minus its standard error over seeds, at the steps that all seeds were scored at."""
    groups: dict[str, list] = {}
    for run in runs:
        groups.setdefault(group_name(run), []).append(run)
    means = []
    for group, members in groups.items():
        if len(members) < 2:
            continue
        rl = isinstance(members[0], RLRun)
        by_step = [
            {p.step: (p.eflops_rl if rl else p.eflops_sft, p.score) for p in (run.points if rl else run.scores)}
            for run in members
        ]
        steps = sorted(set.intersection(*map(set, by_step)))
        if not steps:
            continue
        values = np.array([[seed[step] for step in steps] for seed in by_step])  # [seeds, steps, 2]
        x, y = values.mean(axis=0).T
        se = values[:, :, 1].std(axis=0, ddof=1) / np.sqrt(len(members))
        look = looks[members[0].name]
        joint = float(np.mean([run.eflops_sft for run in members])) if rl else 0.0
        means.append(
            {
                "group": group,
                "set": members[0].set,
                "colour": look.colour,
                "alone": look.alone,
                "seeds": len(members),
                "joint": joint * factor,
                "x": (x * factor).tolist(),
                "y": y.tolist(),
                "low": (y - se).tolist(),
                "high": (y + se).tolist(),
            }
        )
    return means


def _scaled(curve: dict[str, list[float]], factor: float) -> dict[str, list[float]]:
    return {"x": [x * factor for x in curve["eflops_rl"]]} | {key: curve[key] for key in ("median", "low", "high")}


def _rl_rows(run: RLRun, held: HeldOut | None) -> list[list[Any]]:
    x = [p.eflops_rl for p in run.points]
    fitted = list(zip(*run.fit.curve(x))) if run.fit else [("", "", "")] * len(x)
    rows = []
    for i, p in enumerate(run.points):
        out = "" if held is None else int(i >= held.seen)
        predicted = held.predicted[i - held.seen] if out == 1 else ""
        rows.append(
            [
                "rl",
                run.set,
                run.seed,
                run.start_step,
                run.algorithm,
                p.step,
                run.eflops_sft,
                p.eflops_rl,
                p.score,
                p.score_se,
                *fitted[i],
                out,
                predicted,
            ]
        )
    return rows


# -- ceilings ----------------------------------------------------------------------------------------------------------------------


def _ceilings(study: Study) -> Chart | None:
    runs = [run for run in study.rl if run.p_sft.value is not None]
    if not runs:
        return None
    looks = run_looks(study)
    rows, bars = [], []
    for run in sorted(
        runs, key=lambda run: (run.set, run.start_step, run.algorithm, run.seed)
    ):  # seeds beside each other
        fit = run.fit if shows_ceiling(run) else None
        bars.append(
            {
                "name": rl_name(run),
                "set": run.set,
                "colour": looks[run.name].colour,
                "alone": looks[run.name].alone,
                "p_sft": run.p_sft.value,
                "regime": run.start_regime,
                "text": ceiling_text(run).replace("\n", ", "),
                "solid": fit is not None and fit.verdict == "identified",
                "ceiling": fit
                and {"a": fit.a_post, "low": fit.a_post_low, "high": fit.a_post_high, "verdict": fit.verdict},
                "measured": run.last.score,
            }
        )
        fields = ("a_post", "a_post_low", "a_post_high", "pl_rl", "c_mid", "b", "eps")
        rows.append(
            [
                run.set,
                run.seed,
                run.start_step,
                run.algorithm,
                run.eflops_sft,
                run.start_regime,
                run.p_sft.value,
                run.fit.verdict if run.fit else "",
                *([getattr(fit, key) for key in fields] if fit else [""] * len(fields)),
                run.last.score,
            ]
        )
    lowest = min(bar["p_sft"] for bar in bars)
    spec = {
        "x": "score (% of test problems)",
        "bars": bars,
        "sets": _sets(study),
        "begin": 10.0 * int((lowest - 15) / 10) if lowest > 40 else 0.0,
    }
    caption = (
        "The paper's Figure 3: P_sft, the score at the start of RL, in grey; PL_rl = A_post − P_sft, the plasticity that the fit "
        "estimates, on top; the line is the 90 % interval of A_post. Pale bars are not identified; an arrow says that above it "
        "nothing is known. An empty outline is the gain as measured, where the fit gives no ceiling."
    )
    return Chart(
        "ceilings",
        "Score before RL, and what RL adds",
        caption,
        spec,
        (
            "set",
            "seed",
            "start_step",
            "algorithm",
            "eflops_sft",
            "regime",
            "p_sft",
            "verdict",
            "a_post",
            "a_post_low",
            "a_post_high",
            "pl_rl",
            "c_mid",
            "b",
            "eps",
            "last_score",
        ),
        rows,
    )


def _ceiling_against_loss(study: Study) -> Chart | None:
    """One point an SFT run with a validation loss and RL with a ceiling: the highest one. Needs two of them to be a chart."""
    looks = run_looks(study)
    points = []
    for sft in study.sft:
        runs = [run for run in study.rl if study.sft_of(run) is sft and run.start_step > 0 and shows_ceiling(run)]
        if sft.best is None or not runs:
            continue
        top = max(runs, key=lambda run: run.fit.a_post)
        points.append(
            {
                "name": sft.label or sft.name,
                "colour": looks[sft.name].colour,
                "x": sft.best.val_loss,
                "y": top.fit.a_post,
                "low": top.fit.a_post_low,
                "high": top.fit.a_post_high,
                "verdict": top.fit.verdict,
                "start": top.start_step,
            }
        )
    if len(points) < 2:
        return None
    caption = (
        "One point a trajectory set: the minimum of its validation loss, and the highest ceiling of RL from its checkpoints, with "
        "its 90 % interval. Filled: identified."
    )
    if len(points) >= 3:
        pearson, spearman = (
            correlate([p["x"] for p in points], [p["y"] for p in points], kind) for kind in ("pearson", "spearman")
        )
        caption += f" Pearson {pearson}, Spearman {spearman} over {len(points)} points; the paper has −0.92 and −1.00 over five sets."
    return Chart(
        "ceiling_vs_loss",
        "Ceiling against minimum validation loss",
        caption,
        {"x": "minimum validation loss (nats per token)", "y": "highest ceiling A_post (%)", "points": points},
        ("set", "min_val_loss", "a_post", "a_post_low", "a_post_high", "verdict", "start_step"),
        [[p["name"], p["x"], p["y"], p["low"], p["high"], p["verdict"], p["start"]] for p in points],
    )


# -- benchmarks --------------------------------------------------------------------------------------------------------------------


def _benchmarks(study: Study) -> Chart | None:
    """Score of each benchmark against total compute, where eval lines carry them."""
    names = list(dict.fromkeys(name for run in study.runs for p in run.points for name in p.benchmarks))
    if len(names) < 2:  # one benchmark is the score itself
        return None
    looks = run_looks(study)
    factor, unit = _scale([(run.set, _total(run, p)) for run in study.runs for p in run.points if p.benchmarks])
    series, rows = [], []
    for run in study.runs:
        points = [p for p in run.points if p.benchmarks]
        if not points:
            continue
        rl = isinstance(run, RLRun)
        series.append(
            _identity(run, looks, study.runs)
            | {
                "kind": "rl" if rl else "sft",
                "x": [_total(run, p) * factor for p in points],
                "steps": _rl_steps(run, points) if rl else [p.step for p in points],
                "y": {name: [p.benchmarks.get(name) for p in points] for name in names},
            }
        )
        rows += [
            [
                "rl" if rl else "sft",
                run.set,
                run.seed,
                run.start_step if rl else "",
                p.step,
                _total(run, p),
                *(p.benchmarks.get(name, "") for name in names),
            ]
            for p in points
        ]
    return Chart(
        "benchmarks",
        "Learning curves by benchmark",
        "Each benchmark by itself, as measured; nothing is fitted here.",
        {
            "x": f"training compute, SFT + RL ({unit})",
            "y": "score (%)",
            "unit": unit,
            "names": names,
            "series": series,
            "sets": _sets(study),
        },
        ("kind", "set", "seed", "start_step", "step", "eflops_total", *names),
        rows,
    )


def _rl_steps(run: RLRun, points: Sequence[RLPoint]) -> list[int | None]:
    """A file of curves knows the compute of a point, not its step."""
    return [p.step if run.config_text else None for p in points]


def _total(run: SFTRun | RLRun, point: Any) -> float:
    return run.eflops_sft + point.eflops_rl if isinstance(run, RLRun) else point.eflops_sft


# -- compute -----------------------------------------------------------------------------------------------------------------------


def _compute(study: Study) -> Chart | None:
    phases = [phase for phase in PHASES if phase in study.ledger()]
    if not phases:
        return None
    looks = run_looks(study)
    runs = [run for run in study.runs if run.ledger]
    metrics = []
    for key, title in LEDGER_METRICS:
        if not all(key in row for run in runs for row in run.ledger.values()):
            continue
        values = [[run.ledger.get(phase, {}).get(key, 0.0) for phase in phases] for run in runs]
        if not any(map(any, values)):
            continue
        most = max(sum(column) for column in zip(*values))
        factor, unit = (
            flop_scale(most / 1e18) if key.endswith("flops") else (1e18, key.replace("_", " ").replace("seconds", "s"))
        )
        metrics.append(
            {"key": key, "title": title, "unit": unit, "values": [[v / 1e18 * factor for v in row] for row in values]}
        )
    names = [rl_name(run) if isinstance(run, RLRun) else sft_name(run) for run in runs]
    spec = {
        "phases": [PHASE_NAMES[phase] for phase in phases],
        "measuring": [PHASES[phase].axis is None for phase in phases],
        "metrics": metrics,
        "runs": [{"name": name, "colour": looks[run.name].alone} for name, run in zip(names, runs)],
    }
    keys = ("sequences", *(metric["key"] for metric in metrics))
    rows = [
        [run.name, phase, *(run.ledger[phase][key] for key in keys)]
        for run in runs
        for phase in phases
        if phase in run.ledger
    ]
    caption = (
        "All runs of this folder, by phase. The paper's formulas give the x of every curve and of every fit; the exact count has "
        "causal attention, and adds what the formulas leave out, such as log-prob passes. Validation and evaluation (marked *) are "
        "never in x."
    )
    return Chart("compute", "Where the compute went", caption, spec, ("run", "phase", *keys), rows)


# -- shared ------------------------------------------------------------------------------------------------------------------------


def _sets(study: Study) -> list[str]:
    """Names of the sets that can be looked at one by one; [] where there is one."""
    names = list(dict.fromkeys(run.set for run in study.runs if run.set))
    return names if len(names) > 1 else []


def _scale(most: list[tuple[str, float]]) -> tuple[float, str]:
    """flop_scale of the set that spent least: sets are looked at one by one, and 0.002 of a unit does not read well."""
    of_set: dict[str, float] = {}
    for name, eflops in most:
        of_set[name] = max(of_set.get(name, 0.0), eflops)
    return flop_scale(min(of_set.values()))


def _first_of_starts(study: Study, sft: SFTRun) -> list[RLRun]:
    """One run a start from the checkpoints of `sft`: markers of several algorithms would lie on each other."""
    starts: dict[int, RLRun] = {}
    for run in study.rl:
        if run.start_step > 0 and study.sft_of(run) is sft:
            starts.setdefault(run.start_step, run)
    return list(starts.values())


def _plain_cell(value: Any) -> Any:
    """A spreadsheet runs a cell that begins with one of these as a formula: names come from files."""
    if isinstance(value, str) and value[:1] in ("=", "+", "-", "@", "\t", "\r"):
        return "'" + value
    return "" if value is None else value
