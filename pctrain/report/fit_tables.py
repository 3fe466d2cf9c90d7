"""What `pctrain fit` prints: one line a curve, then held-out points and forecasts where they were asked for. 80 columns are enough."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from pctrain.ceiling.fit import Fit
from pctrain.ceiling.paper_fit import PaperFit

if TYPE_CHECKING:
    from pctrain.report.fit_command import Result

BAYES_LEGEND = (
    "A_post: median and 90 % interval of the posterior, percent. shift: points A_post moves by under wide priors, so what of it is theirs. "
    "collapsed: EFLOPs from the joint; fitted to the points before. points: used/all where some were left out. lower_bound: only the lower "
    "end of the interval means anything; flat: no gain yet, not a ceiling; too_short: the prior speaks. C_mid, B and eps: in the file."
)
PAPER_LEGEND = (
    "The pipeline of arXiv 2512.11470, appendix F: no interval, no verdict; docs/ceilings.md says how far off it can be. points: "
    "kept/given. rmse: of the points kept. A collapsed curve has no sigmoid: its ceiling is the best score before."
)
FORECAST_LEGEND = (
    "Medians and 90 % intervals, EFLOPs from the joint. P: probability that any compute is enough. measured: one score, with its noise. "
    "All of a curve that goes on as a sigmoid: no collapse and no second rise is foreseen."
)


def show(results: Sequence[Result], method: str, console: Console) -> None:
    console.print((_bayes if method == "bayes" else _paper)(results))
    console.print(BAYES_LEGEND if method == "bayes" else PAPER_LEGEND, style="dim", highlight=False)
    if any(result.held_out is not None for result in results):
        console.print(_held_out(results))
        console.print(
            "Points that the fit did not see, without those after a collapse. inside: share in the predictive 90 % interval.",
            style="dim",
            highlight=False,
        )
    asked = [table(results) for name, table in (("reach", _reach), ("budget", _budget)) if getattr(results[0], name)]
    for table in asked:
        console.print(table)
    if asked:
        console.print(FORECAST_LEGEND, style="dim", highlight=False)


def _bayes(results: Sequence[Result]) -> Table:
    table = _table(results, ("P_sft", "A_post", "5 - 95 %", "shift", "PL_rl", "points"), ("verdict",))
    for result in results:
        fit = result.fit
        assert isinstance(fit, Fit)
        verdict = fit.verdict if fit.collapsed_at is None else f"{fit.verdict}, {fit.collapsed_at:.3g}"
        table.add_row(
            *_name(result),
            f"{fit.p_sft:.1f}",
            f"{fit.a_post:.1f}",
            f"{fit.a_post_low:.1f}-{fit.a_post_high:.1f}",
            f"{fit.prior_shift:+.1f}",
            f"{fit.pl_rl:.1f}",
            _points(fit),
            verdict,
        )
    return table


def _paper(results: Sequence[Result]) -> Table:
    table = _table(results, ("P_sft", "A_post", "PL_rl", "C_mid", "B", "rmse", "points"), ("",))
    for result in results:
        fit = result.fit
        assert isinstance(fit, PaperFit)
        collapsed = "" if fit.collapsed_at is None else f"collapsed, {fit.collapsed_at:.3g}"
        table.add_row(
            *_name(result),
            f"{fit.p_sft:.1f}",
            f"{fit.a_post:.1f}",
            f"{fit.pl_rl:.1f}",
            _number(fit.c_mid, ".3g"),
            _number(fit.b, ".2f"),
            _number(fit.train_rmse, ".2f"),
            _points(fit),
            collapsed,
        )
    return table


def _held_out(results: Sequence[Result]) -> Table:
    table = _table(results, ("points held out", "RMSE", "inside"))
    for result in results:
        if result.held_out is not None:
            rest = result.held_out
            table.add_row(*_name(result), str(rest.points), _number(rest.rmse, ".2f"), _number(rest.inside, ".0%"))
    return table


def _reach(results: Sequence[Result]) -> Table:
    table = _table(results, ("score", "P", "EFLOPs", "5 - 95 %"))
    for result in results:
        for entry in result.reach:
            low, high = (_number(value, ".3g", "never") for value in (entry.eflops_low, entry.eflops_high))
            interval = "" if entry.probability is None else "never" if entry.eflops_low is None else f"{low} - {high}"
            table.add_row(
                *_name(result),
                f"{entry.score:g}",
                _number(entry.probability, ".2f", ""),
                _number(entry.eflops, ".3g", "never"),
                interval,
            )
    return table


def _budget(results: Sequence[Result]) -> Table:
    table = _table(results, ("EFLOPs", "score", "5 - 95 %", "measured"))
    for result in results:
        for entry in result.budget:
            table.add_row(
                *_name(result),
                f"{entry.eflops:g}",
                f"{entry.score:.1f}",
                _interval(entry.low, entry.high),
                _interval(entry.measured_low, entry.measured_high),
            )
    return table


def _table(results: Sequence[Result], numbers: Sequence[str], words: Sequence[str] = ()) -> Table:
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), show_edge=False)
    table.add_column("data set", overflow="fold", min_width=8)
    if any(result.curve.start_step is not None for result in results):
        numbers = ("step", *numbers)
    for name in numbers:
        table.add_column(name, justify="right", no_wrap=True)
    for name in words:
        table.add_column(name, no_wrap=True)
    return table


def _name(result: Result) -> list[Text | str]:
    """A name comes from a file: no markup in it is obeyed."""
    step = result.curve.start_step
    return [Text(result.curve.dataset), *([str(step)] if step is not None else [])]


def _points(fit: Fit | PaperFit) -> str:
    return str(fit.n_points) if fit.n_used == fit.n_points else f"{fit.n_used}/{fit.n_points}"


def _interval(low: float | None, high: float | None) -> str:
    return "" if low is None or high is None else f"{low:.1f}-{high:.1f}"


def _number(value: float | None, form: str, none: str = "-") -> str:
    return none if value is None else format(value, form)
