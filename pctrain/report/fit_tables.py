"""The tables that `pctrain fit` prints: one row per curve, then held-out points and forecasts. They fit 80 columns."""

from __future__ import annotations

from collections.abc import Sequence

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from pctrain.ceiling.fit import Fit
from pctrain.ceiling.paper_fit import PaperFit
from pctrain.report.fit_result import Result

BAYES_COLUMNS = ("P_sft", "A_post", "5 - 95%", "shift", "PL_rl", "points")
BAYES_LEGEND = (
    "A_post: median and 90% interval of the posterior, percent. shift: change of A_post under wide priors, in points, "
    "so how much the priors decide. points: used/all if some were left out. collapsed: EFLOPs of the collapse; the fit "
    "uses the points before it. lower_bound: only the lower end of the interval carries information. flat: no gain "
    "yet, so this is not a ceiling. too_short: mostly the prior. The file also has C_mid, B and eps."
)
PAPER_COLUMNS = ("P_sft", "A_post", "PL_rl", "C_mid", "B", "rmse", "points")
PAPER_LEGEND = (
    "The pipeline of arXiv 2512.11470, appendix F: no interval, no verdict. docs/ceilings.md says how far off it can "
    "be. points: kept/given. rmse: of the points kept. A collapsed curve has no sigmoid: its ceiling is the best score "
    "before the collapse."
)
HELD_OUT_LEGEND = (
    "Points that the fit did not see, without those after a collapse. inside: share in the predictive 90% interval."
)
FORECAST_LEGEND = (
    "Medians and 90% intervals, EFLOPs from the switch point. P: probability that any compute is enough. measured: one "
    "score, with its noise. All of this assumes a curve that continues as one sigmoid; it foresees no collapse and no "
    "second rise."
)


def show(results: Sequence[Result], method: str, console: Console) -> None:
    """Print the tables of one or more results."""
    console.print(_fits(results, method))
    _print_legend(BAYES_LEGEND if method == "bayes" else PAPER_LEGEND, console)
    if any(result.held_out is not None for result in results):
        console.print(_held_out(results))
        _print_legend(HELD_OUT_LEGEND, console)
    if results[0].reach:
        console.print(_reach(results))
    if results[0].budget:
        console.print(_budget(results))
    if results[0].reach or results[0].budget:
        _print_legend(FORECAST_LEGEND, console)


def _print_legend(text: str, console: Console) -> None:
    console.print(text, style="dim", highlight=False)


# ---- tables


def _fits(results: Sequence[Result], method: str) -> Table:
    bayes = method == "bayes"
    table = _table(results, BAYES_COLUMNS if bayes else PAPER_COLUMNS, ("verdict" if bayes else "",))
    for result in results:
        cells = _bayes_cells(result.fit) if isinstance(result.fit, Fit) else _paper_cells(result.fit)
        table.add_row(*_name(result), *cells)
    return table


def _bayes_cells(fit: Fit) -> list[str]:
    return [
        f"{fit.p_sft:.1f}",
        f"{fit.a_post:.1f}",
        f"{fit.a_post_low:.1f}-{fit.a_post_high:.1f}",
        f"{fit.prior_shift:+.1f}",
        f"{fit.pl_rl:.1f}",
        _points(fit),
        fit.verdict if fit.collapsed_at is None else f"{fit.verdict}, {fit.collapsed_at:.3g}",
    ]


def _paper_cells(fit: PaperFit) -> list[str]:
    return [
        f"{fit.p_sft:.1f}",
        f"{fit.a_post:.1f}",
        f"{fit.pl_rl:.1f}",
        _number(fit.c_mid, ".3g"),
        _number(fit.b, ".2f"),
        _number(fit.train_rmse, ".2f"),
        _points(fit),
        "" if fit.collapsed_at is None else f"collapsed, {fit.collapsed_at:.3g}",
    ]


def _held_out(results: Sequence[Result]) -> Table:
    table = _table(results, ("points held out", "RMSE", "inside"))
    for result in results:
        if result.held_out is not None:
            rest = result.held_out
            table.add_row(*_name(result), str(rest.points), _number(rest.rmse, ".2f"), _number(rest.inside, ".0%"))
    return table


def _reach(results: Sequence[Result]) -> Table:
    table = _table(results, ("score", "P", "EFLOPs", "5 - 95%"))
    for result in results:
        for entry in result.reach:
            interval = ""
            if entry.probability is not None:
                low, high = (_number(value, ".3g", "never") for value in (entry.eflops_low, entry.eflops_high))
                interval = "never" if entry.eflops_low is None else f"{low} - {high}"
            table.add_row(
                *_name(result),
                f"{entry.score:g}",
                _number(entry.probability, ".2f", ""),
                _number(entry.eflops, ".3g", "never"),
                interval,
            )
    return table


def _budget(results: Sequence[Result]) -> Table:
    table = _table(results, ("EFLOPs", "score", "5 - 95%", "measured"))
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


# ---- cells


def _table(results: Sequence[Result], number_columns: Sequence[str], text_columns: Sequence[str] = ()) -> Table:
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), show_edge=False)
    table.add_column("data set", overflow="fold", min_width=8)
    if any(result.curve.start_step is not None for result in results):
        number_columns = ("step", *number_columns)
    for name in number_columns:
        table.add_column(name, justify="right", no_wrap=True)
    for name in text_columns:
        table.add_column(name, no_wrap=True)
    return table


def _name(result: Result) -> list[Text | str]:
    """Return the cells that name the curve. A name comes from a file, so markup in it has no effect."""
    name = Text(result.curve.dataset)
    return [name] if result.curve.start_step is None else [name, str(result.curve.start_step)]


def _points(fit: Fit | PaperFit) -> str:
    return str(fit.n_points) if fit.n_used == fit.n_points else f"{fit.n_used}/{fit.n_points}"


def _interval(low: float | None, high: float | None) -> str:
    return "" if low is None or high is None else f"{low:.1f}-{high:.1f}"


def _number(value: float | None, form: str, none: str = "-") -> str:
    return none if value is None else format(value, form)
