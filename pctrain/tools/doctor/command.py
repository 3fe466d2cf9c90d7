"""All checks of `pctrain doctor` in order, and the table that it prints."""

from __future__ import annotations

import os
import platform
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table

from pctrain.common.progress import make_console
from pctrain.tools.doctor.findings import Finding, combined
from pctrain.tools.doctor.gpus import kind
from pctrain.tools.doctor.host import machine
from pctrain.tools.doctor.libraries import imports
from pctrain.tools.doctor.ranks import between_ranks, exchange, measured
from pctrain.tools.doctor.variables import environment
from pctrain.tools.doctor.versions import packages


def main(folder: Path, console: Console | None = None) -> int:
    """Print the findings and return the exit status. Collective.

    `folder` is where runs will be written. Nothing that needs the ranks' connection begins before the ranks have told
    each other what they found: a wrong driver or version on one of them would let the others wait, without a reason.
    """
    where = kind()
    own = [*packages(where), *environment(where), *imports()]
    if any(finding.check == "import torch" and finding.state == "wrong" for finding in own):
        _print(own, console or make_console())
        return 1
    from pctrain.distributed import gpu_environment

    gpu_environment.prepare()  # before a GPU is asked for, as in a run
    own += machine(folder)
    hosts, by_rank = zip(*exchange((platform.node(), own)), strict=True)
    findings = combined(by_rank, hosts)
    if any(finding.stops and finding.state == "wrong" for finding in findings):
        findings.append(Finding("rates", "not measured", "note", "fix what is wrong, and call doctor again"))
    else:
        findings += _rates(hosts)
    if int(os.environ.get("RANK", "0")) == 0:
        _print(findings, console or make_console())
    return int(any(finding.state == "wrong" for finding in findings))


def _rates(hosts: tuple[str, ...]) -> list[Finding]:
    """Connect the ranks and measure them. Collective."""
    from pctrain.config.tree import ParallelConfig
    from pctrain.distributed import parallel

    try:
        parallel.initialize(ParallelConfig(timeout=120), seed=0)
        return [*combined(parallel.gather(measured()), hosts), *between_ranks()]
    except Exception as error:  # torch, NCCL and the driver raise many kinds
        advice = (
            "the ranks cannot be connected or measured. NCCL_DEBUG=INFO says why, and which interface it uses; see "
            "docs/gpu.md, section Networks"
        )
        reason = " ".join(str(error).split())[:500]
        return [Finding("rates", f"{type(error).__name__}: {reason}", "wrong", advice)]


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
