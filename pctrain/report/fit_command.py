"""`pctrain fit CURVES`: the ceiling of every RL curve in a file, a run folder or a study, and forecasts from it."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from pctrain.ceiling import collapse
from pctrain.ceiling.curve import Curve
from pctrain.ceiling.fit import VERDICTS, Fit, fit_curve
from pctrain.ceiling.forecast import at_budgets, held_out, reach
from pctrain.ceiling.paper_fit import MIN_POINTS, PaperFit, paper_fit
from pctrain.common.errors import UserError
from pctrain.common.progress import make_console, track
from pctrain.files.durable import write_atomically
from pctrain.report import fit_tables
from pctrain.report.curves import read_curves
from pctrain.report.fit_options import PAPER_SHARE, FitOptions
from pctrain.report.fit_result import Result

MIN_CURVE_POINTS = {"bayes": 2, "paper": MIN_POINTS}  # a single score after the switch point is not a curve
DEFAULT_SHARE = {"bayes": 1.0, "paper": PAPER_SHARE}
PAPER_OPTIONS = ("tau", "alpha", "eps")


def main(path: Path | str, options: FitOptions, console: Console | None = None) -> list[dict[str, Any]]:
    """Fit all curves in `path`, write the rows to `options.out`, print tables; return the rows.

    docs/reference/ceilings.md describes the rows.
    """
    path = Path(path)
    _check_options(options)
    _check_out(path, options.out)
    share = options.points or DEFAULT_SHARE[options.method]
    curves = read_curves(path)
    _check_scores(options.reach, curves)
    least = MIN_CURVE_POINTS[options.method]
    long_enough = [curve for curve in curves if curve.first(share) >= least]
    skipped = [curve for curve in curves if curve.first(share) < least]
    if not long_enough:
        larger_share = f", or fit a larger share than --points={share:g}" if share < 1 else ""
        raise UserError(
            f"{path}: no curve has {least} points to fit after the switch point. Evaluate the RL run more often "
            f"(rl.eval_every){larger_share}."
        )

    results = [
        _fit(curve, share, options) for curve in track(long_enough, "fits", total=len(long_enough), unit="curve")
    ]
    rows = [result.row() for result in results]
    try:
        write_atomically(options.out, json.dumps(rows, indent=1, allow_nan=False) + "\n")
    except OSError as error:
        raise UserError(f"{options.out}: cannot be written ({error})") from None
    console = console or make_console()
    fit_tables.show(results, options.method, console)
    _print_summary(results, skipped, share, options, console)
    return rows


def _fit(curve: Curve, share: float, options: FitOptions) -> Result:
    n = curve.first(share)
    fit: Fit | PaperFit
    if options.method == "bayes":
        fit = fit_curve(curve, n)
    else:
        given = {name: value for name in PAPER_OPTIONS if (value := getattr(options, name)) is not None}
        fit = paper_fit(curve.eflops[:n], curve.scores[:n], curve.p_sft, max_score=curve.max_score, **given)
    rest = None
    if n < len(curve.eflops):
        end = _collapse_start(curve)
        rest = held_out(fit, curve.eflops[n:end], curve.scores[n:end])
    return Result(curve, fit, rest, [reach(fit, score) for score in options.reach], at_budgets(fit, options.budget))


def _collapse_start(curve: Curve) -> int | None:
    """Return the index of the first point of a collapse of the whole curve: no method is expected to foresee it."""
    return collapse.used_points(curve.scores, curve.p_sft, curve.score_se)[1]


def _print_summary(
    results: Sequence[Result], skipped: Sequence[Curve], share: float, options: FitOptions, console: Console
) -> None:
    for curve in skipped:
        n = len(curve.eflops)
        in_share = f", {curve.first(share)} of them in the first {share:.0%}" if share < 1 else ""
        console.print(
            f"not fitted: {curve.name} has {n} point{'s' if n != 1 else ''} after the switch point{in_share}; "
            f"a fit needs {MIN_CURVE_POINTS[options.method]}",
            highlight=False,
            markup=False,
        )
    count = Counter(result.fit.verdict for result in results if isinstance(result.fit, Fit))
    verdicts = ", ".join(f"{count[verdict]} {verdict}" for verdict in VERDICTS if count[verdict])
    console.print(
        f"{len(results)} curves fitted{f' ({verdicts})' if verdicts else ''}, {len(skipped)} skipped -> {options.out}",
        highlight=False,
        markup=False,
        soft_wrap=True,
    )


def _check_options(options: FitOptions) -> None:
    given = [name for name in PAPER_OPTIONS if getattr(options, name) is not None]
    if given and options.method != "paper":
        raise UserError(
            f"pctrain fit: --{given[0]} belongs to --method=paper. The Bayesian fit has no options: it is the same for "
            "every curve."
        )
    for name in ("reach", "budget"):
        for value in getattr(options, name):
            if not np.isfinite(value) or value < 0:
                raise UserError(f"pctrain fit: --{name}: expected a finite number, 0 or more, got {value}")


def _check_scores(scores: Sequence[float], curves: Sequence[Curve]) -> None:
    highest = max(curve.max_score for curve in curves)
    for score in scores:
        if score > highest:
            raise UserError(f"pctrain fit: --reach={score:g}: scores are in percent and end at {highest:g}")


def _check_out(path: Path, out: Path) -> None:
    """Refuse an output file that cannot be written before any work is done."""
    if out.is_dir() or not out.resolve().parent.is_dir():
        raise UserError(f"{out}: the fits need a file in a folder that exists; give --out FILE")
    if out.exists() and path.exists() and out.samefile(path):
        raise UserError(f"{out}: would overwrite the curves; give another --out")
