"""`pctrain report RUN --ledger`: where the compute of a study or a run went, by run and phase, as a table."""

from __future__ import annotations

from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from pctrain.common.errors import UserError
from pctrain.common.progress import make_console
from pctrain.compute.ledger import PHASES
from pctrain.report.looks import PHASE_NAMES, flops_text
from pctrain.report.reading import read_study
from pctrain.report.study_data import LEDGER_KEYS, Study, sum_ledgers
from pctrain.run.documents import has_ranks, read_slowest_ranks

LEGEND = (
    "paper: FLOPs by the formulas of arXiv 2512.11470, appendix E, the x of all curves. exact: FLOPs with causal "
    "attention and every pass that was made. share: of the exact FLOPs and of the device seconds (wall seconds x "
    "ranks) of all runs. *: measuring, never in x."
)
RANKS_LEGEND = (
    "s per step: the rank's own work in a phase, without its waits for other ranks. others: the median of the other "
    "ranks. Both since the last start of the run."
)


def main(source: Path, console: Console | None = None) -> None:
    """Print the table.

    Raises:
        UserError: there are no runs, or a ledger is missing or malformed.
    """
    if source.is_file():
        raise UserError(f"{source}: a file of curves has no ledger. --ledger needs a study folder or a run folder.")
    study = read_study(source)
    whole = study.ledger()
    if not whole:
        raise UserError(f"{source}: the ledger is empty, because no run has finished its first step. Try again later.")
    totals = {key: sum(row[key] for row in whole.values()) for key in ("exact_flops", "device_seconds")}
    table = _table(f"{study.name}: where the compute went")
    table.add_column("run", overflow="fold", min_width=8)
    table.add_column("phase", no_wrap=True)
    for name in ("tokens", "paper", "exact", "share", "wall s", "device s", "share"):
        table.add_column(name, justify="right", no_wrap=True)
    for run in study.runs:
        _add_rows(table, run.name, run.ledger, totals)
    if len(study.runs) > 1:
        _add_rows(table, "all runs", whole, totals)
    console = console or make_console()
    console.print(table)
    console.print(LEGEND, style="dim", highlight=False)
    if any(has_ranks(run.folder) for run in study.runs):
        console.print()
        console.print(_ranks(study))
        console.print(RANKS_LEGEND, style="dim", highlight=False)


def _table(title: str) -> Table:
    return Table(
        title=Text(title),
        title_justify="left",
        title_style="bold",
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        show_edge=False,
    )


def _ranks(study: Study) -> Table:
    """Return a table of the slowest rank of each phase, for the runs on several ranks."""
    table = _table("the slowest rank")
    for name in ("run", "phase", "rank"):
        table.add_column(name, overflow="fold")
    for name in ("s per step", "others", "ratio"):
        table.add_column(name, justify="right", no_wrap=True)
    for run in study.runs:
        for i, row in enumerate(read_slowest_ranks(run.folder) if has_ranks(run.folder) else []):
            ratio = f"{row['seconds'] / row['others']:.2f}" if row["others"] else "-"
            table.add_row(
                Text(run.name if i == 0 else ""),
                Text(row["phase"]),
                Text(f"{row['rank']} ({row['place']})"),
                f"{row['seconds']:.3g}",
                f"{row['others']:.3g}",
                ratio,
            )
    return table


def _add_rows(table: Table, name: str, ledger: dict[str, dict[str, float]], totals: dict[str, float]) -> None:
    """Add one row per phase, and their sum."""
    phases = [phase for phase in PHASES if phase in ledger]
    for i, phase in enumerate(phases):
        measuring = " *" if PHASES[phase].axis is None else ""
        table.add_row(Text(name if i == 0 else ""), PHASE_NAMES[phase] + measuring, *_cells(ledger[phase], totals))
    total = sum_ledgers([{"all": row} for row in ledger.values()]).get("all", dict.fromkeys(LEDGER_KEYS, 0.0))
    table.add_row(Text("" if phases else name), "all phases", *_cells(total, totals), style="bold", end_section=True)


def _cells(row: dict[str, float], totals: dict[str, float]) -> list[str]:
    shares = {key: f"{100 * row[key] / total:.1f}%" if total else "-" for key, total in totals.items()}
    return [
        f"{row['tokens']:,.0f}",
        flops_text(row["paper_flops"] / 1e18),
        flops_text(row["exact_flops"] / 1e18),
        shares["exact_flops"],
        f"{row['seconds']:,.1f}",
        f"{row['device_seconds']:,.1f}",
        shares["device_seconds"],
    ]
