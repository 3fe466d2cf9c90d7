"""`pctrain fit CURVES --out fits.json`: the ceiling of every RL curve in a file, a run folder or a study folder."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table

from pctrain.ceiling.curves import Curve, read_curves
from pctrain.ceiling.fit import VERDICTS, Fit, fit_ceiling
from pctrain.durable import write_beside
from pctrain.errors import UserError
from pctrain.progress import make_console, progress

MIN_CURVE_POINTS = 2  # one reading after the joint is no curve

LEGEND = (
    "A_post: median and 90 % interval of the posterior, percent. C_mid and collapse: EFLOPs from the joint. points: used/all where some "
    "were left out. lower_bound: only the lower end of the interval means anything; flat: no gain yet, not a ceiling; too_short: the prior "
    "speaks; collapsed: fitted to the points before the collapse.")


def main(path: Path | str, out: Path | str, console: Console | None = None) -> list[dict]:
    """Fit all curves below `path`, write the rows of docs/contracts.md as a JSON list to `out`, print a table; returns the rows."""
    path, out = Path(path), Path(out)
    _check_out(path, out)
    curves = read_curves(path)
    long_enough = [curve for curve in curves if len(curve.eflops) >= MIN_CURVE_POINTS]
    skipped = [curve for curve in curves if len(curve.eflops) < MIN_CURVE_POINTS]
    if not long_enough:
        raise UserError(f"{path}: no curve has {MIN_CURVE_POINTS} points after the joint; score the RL run more often (rl.eval_every)")

    fits = []
    with progress("fits", total=len(long_enough), unit="curve") as bar:
        for curve in long_enough:
            fits.append(fit_ceiling(curve.eflops, curve.scores, curve.p_sft, score_se=curve.score_se, p_sft_se=curve.p_sft_se))
            bar.advance()
    rows = [fit.as_row(curve.dataset, curve.start_step) for curve, fit in zip(long_enough, fits, strict=True)]
    try:
        write_beside(out, json.dumps(rows, indent=1, allow_nan=False) + "\n")
    except OSError as error:
        raise UserError(f"{out}: cannot be written ({error})") from None

    console = console or make_console()
    console.print(_table(long_enough, fits))
    console.print(LEGEND, style="dim", highlight=False)
    for curve in skipped:
        console.print(f"not fitted: {curve.name} has {len(curve.eflops)} point after the joint", highlight=False)
    count = Counter(fit.verdict for fit in fits)
    verdicts = ", ".join(f"{count[verdict]} {verdict}" for verdict in VERDICTS if count[verdict])
    console.print(f"{len(fits)} curves fitted ({verdicts}), {len(skipped)} skipped -> {out}", highlight=False, soft_wrap=True)
    return rows


def _table(curves: list[Curve], fits: list[Fit]) -> Table:
    """Fits 80 columns; B and eps are in the file."""
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), show_edge=False)
    table.add_column("data set", overflow="fold", min_width=9)
    for name in ("step", "P_sft", "A_post", "5 - 95 %", "PL_rl", "C_mid", "points"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("verdict", no_wrap=True)
    for curve, fit in zip(curves, fits, strict=True):
        verdict = fit.verdict if fit.collapsed_at is None else f"{fit.verdict}, {fit.collapsed_at:.3g}"
        interval = f"{fit.a_post_low:.1f}-{fit.a_post_high:.1f}"
        points = str(fit.n_points) if fit.n_used == fit.n_points else f"{fit.n_used}/{fit.n_points}"
        table.add_row(curve.dataset, str(curve.start_step), f"{fit.p_sft:.1f}", f"{fit.a_post:.1f}", interval,
                      f"{fit.pl_rl:.1f}", f"{fit.c_mid:.3g}", points, verdict)
    return table


def _check_out(path: Path, out: Path) -> None:
    """Before any work: a result that cannot be written would be lost."""
    if out.is_dir() or not out.resolve().parent.is_dir():
        raise UserError(f"{out}: the fits go into a file in a folder that exists; give --out FILE")
    if out.exists() and path.exists() and out.samefile(path):
        raise UserError(f"{out}: would overwrite the curves; give another --out")
