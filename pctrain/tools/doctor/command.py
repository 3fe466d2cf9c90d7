"""All checks of `pctrain doctor` in order, and the table that it prints."""

from __future__ import annotations

from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table

from pctrain.common.progress import make_console
from pctrain.tools.doctor.findings import Finding, combined
from pctrain.tools.doctor.host import machine
from pctrain.tools.doctor.libraries import imports
from pctrain.tools.doctor.ranks import between_ranks, measured
from pctrain.tools.doctor.variables import environment
from pctrain.tools.doctor.versions import packages


def main(folder: Path, console: Console | None = None) -> int:
    """Print the findings and return the exit status. Collective.

    `folder` is where runs will be written.
    """
    from pctrain.common.device import on_gpu
    from pctrain.config.tree import ParallelConfig
    from pctrain.distributed import parallel

    parallel.initialize(ParallelConfig(timeout=120), seed=0)
    where = "gpu" if on_gpu() else "cpu"
    own = [*packages(where), *environment(where), *imports(), *machine(folder), *measured(where)]
    findings = [*combined(parallel.gather(own)), *between_ranks(where)]
    if parallel.rank() == 0:
        _print(findings, console or make_console())
    return int(any(finding.state == "wrong" for finding in findings))


def _print(findings: list[Finding], console: Console) -> None:
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), show_edge=False)
    for name in ("", "check", "result"):
        table.add_column(name, overflow="fold")
    marks, styles = {"ok": "ok", "note": "note", "wrong": "WRONG"}, {"ok": "", "note": "yellow", "wrong": "bold red"}
    for finding in findings:
        table.add_row(marks[finding.state], finding.check, finding.result, style=styles[finding.state])
    console.print(table, markup=False)
    for finding in findings:
        if finding.state != "ok":
            line = f"{marks[finding.state]}: {finding.check}, {finding.result}: {finding.advice}"
            console.print(line, markup=False, highlight=False, soft_wrap=True)
    wrong = sum(finding.state == "wrong" for finding in findings)
    problems = f"{wrong} problem{'s' if wrong > 1 else ''} to fix"
    console.print(problems if wrong else "ready to train", style="bold")
