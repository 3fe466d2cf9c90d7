"""`pctrain fit CURVES`: the ceiling of every RL curve in a file, a run folder or a study, and what it says of compute not yet spent."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from rich.console import Console

from pctrain.ceiling import collapse
from pctrain.ceiling.curve import Curve
from pctrain.ceiling.fit import VERDICTS, Fit, fit_curve
from pctrain.ceiling.forecast import AtBudget, HeldOut, Reach, at_budgets, held_out, reach
from pctrain.ceiling.paper_fit import MIN_POINTS, PaperFit, paper_fit
from pctrain.common.errors import UserError
from pctrain.common.progress import make_console, progress
from pctrain.files.durable import write_beside
from pctrain.report import fit_tables
from pctrain.report.curves import read_curves
from pctrain.report.fit_options import PAPER_SHARE, FitOptions

MIN_CURVE_POINTS = {"bayes": 2, "paper": MIN_POINTS}  # to fit; one reading after the joint is no curve


@dataclass(frozen=True)
class Result:
    """All that was asked about one curve."""

    curve: Curve
    fit: Fit | PaperFit
    held_out: HeldOut | None
    reach: list[Reach]
    budget: list[AtBudget]

    def row(self) -> dict:
        """The row of fits.json: plain JSON values, the keys of docs/contracts.md."""
        row = self.fit.as_row(self.curve.dataset, self.curve.start_step)
        if self.held_out is not None:
            row["held_out"] = dataclasses.asdict(self.held_out)
        for name in ("reach", "budget"):
            if getattr(self, name):
                row[name] = [dataclasses.asdict(entry) for entry in getattr(self, name)]
        return row


def main(path: Path | str, options: FitOptions, console: Console | None = None) -> list[dict]:
    """Fit all curves below `path`, write the rows of docs/contracts.md as a JSON list to `options.out`, print tables; returns the rows."""
    path = Path(path)
    _check_options(options)
    _check_out(path, options.out)
    share = options.points or {"bayes": 1.0, "paper": PAPER_SHARE}[options.method]
    curves = read_curves(path)
    _check_scores(options.reach, curves)
    fitted = [curve for curve in curves if curve.first(share) >= MIN_CURVE_POINTS[options.method]]
    skipped = [curve for curve in curves if curve.first(share) < MIN_CURVE_POINTS[options.method]]
    if not fitted:
        more = f", or fit a larger share than --points={share:g}" if share < 1 else ""
        raise UserError(
            f"{path}: no curve has {MIN_CURVE_POINTS[options.method]} points to fit after the joint; score the RL run more "
            f"often (rl.eval_every){more}"
        )

    results = []
    with progress("fits", total=len(fitted), unit="curve") as bar:
        for curve in fitted:
            results.append(_result(curve, share, options))
            bar.advance()
    rows = [result.row() for result in results]
    try:
        write_beside(options.out, json.dumps(rows, indent=1, allow_nan=False) + "\n")
    except OSError as error:
        raise UserError(f"{options.out}: cannot be written ({error})") from None
    _print(results, skipped, share, options, console or make_console())
    return rows


def _result(curve: Curve, share: float, options: FitOptions) -> Result:
    n = curve.first(share)
    if options.method == "bayes":
        fit = fit_curve(curve, n)
    else:
        given = {name: getattr(options, name) for name in ("tau", "alpha", "eps") if getattr(options, name) is not None}
        fit = paper_fit(curve.eflops[:n], curve.scores[:n], curve.p_sft, max_score=curve.max_score, **given)
    rest = None
    if n < len(curve.eflops):
        end = _collapse_of(curve)
        rest = held_out(fit, curve.eflops[n:end], curve.scores[n:end])
    return Result(curve, fit, rest, [reach(fit, score) for score in options.reach], at_budgets(fit, options.budget))


def _collapse_of(curve: Curve) -> int | None:
    """Index of the first point of a collapse of the whole curve: no method is asked to foresee it."""
    return collapse.used_points(curve.scores, curve.p_sft, curve.score_se)[1]


def _print(results: list[Result], skipped: list[Curve], share: float, options: FitOptions, console: Console) -> None:
    fit_tables.show(results, options.method, console)
    for curve in skipped:
        n = len(curve.eflops)
        of = f", {curve.first(share)} of them in the first {share:.0%}" if share < 1 else ""
        console.print(
            f"not fitted: {curve.name} has {n} point{'s' if n != 1 else ''} after the joint{of}; "
            f"{MIN_CURVE_POINTS[options.method]} are needed",
            highlight=False,
            markup=False,
        )
    said = ""
    if options.method == "bayes":
        count = Counter(result.fit.verdict for result in results)
        said = f" ({', '.join(f'{count[verdict]} {verdict}' for verdict in VERDICTS if count[verdict])})"
    console.print(
        f"{len(results)} curves fitted{said}, {len(skipped)} skipped -> {options.out}",
        highlight=False,
        markup=False,
        soft_wrap=True,
    )


def _check_options(options: FitOptions) -> None:
    given = [name for name in ("tau", "alpha", "eps") if getattr(options, name) is not None]
    if given and options.method != "paper":
        raise UserError(
            f"pctrain fit: --{given[0]} belongs to --method=paper; the Bayesian fit has no settings, the same for every curve"
        )
    for name in ("reach", "budget"):
        for value in getattr(options, name):
            if not np.isfinite(value) or value < 0:
                raise UserError(f"pctrain fit: --{name}: expected a finite number, 0 or more, got {value}")


def _check_scores(scores: list[float], curves: list[Curve]) -> None:
    top = max(curve.max_score for curve in curves)
    for score in scores:
        if score > top:
            raise UserError(f"pctrain fit: --reach={score:g}: scores are in percent and end at {top:g}")


def _check_out(path: Path, out: Path) -> None:
    """Before any work: a result that cannot be written would be lost."""
    if out.is_dir() or not out.resolve().parent.is_dir():
        raise UserError(f"{out}: the fits go into a file in a folder that exists; give --out FILE")
    if out.exists() and path.exists() and out.samefile(path):
        raise UserError(f"{out}: would overwrite the curves; give another --out")
