"""`pctrain report`: what a study, a run or a file of curves showed, and what it did not: one HTML page, PNG and CSV of its charts,
study.json. findings.py has the sentences, charts.py the numbers of the charts, page.py the page; watch.py serves it while a run goes on.
"""

from __future__ import annotations

import json
import platform
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table
from rich.text import Text

from pctrain.common.errors import UserError
from pctrain.common.progress import make_console
from pctrain.files.durable import plain, write_beside
from pctrain.report import charts, curve_report, figures, findings, held_out, page
from pctrain.report.not_shown import not_shown
from pctrain.report.answers import answers
from pctrain.report.looks import ceiling_text
from pctrain.report.reading import read_study
from pctrain.report.study_data import Study, as_json

PACKAGES = (
    "pctrain",
    "numpy",
    "scipy",
    "matplotlib",
    "plotly",
    "torch",
    "megatron-core",
    "vllm",
    "transformers",
    "math-verify",
)


@dataclass(frozen=True)
class Report:
    """Everything that is written or served, made once from one reading of the files."""

    study: Study
    values: dict[str, Any]  # study.json
    charts: list[charts.Chart]
    words: dict[str, Any]  # headline, held: what the page's template takes beside the numbers

    def page(self, live: dict[str, Any] | None = None) -> str:
        return page.render(self.study, self.values, self.charts, **self.words, live=live)

    def sections(self) -> dict[str, str]:
        return page.sections(self.study, self.values, self.charts, **self.words)


def main(source: Path | str, out: Path | None = None) -> Path:
    """Write report.html, figures/*.png, figures/*.csv and study.json, print the summary; returns the folder they are in.

    `source`: a study folder or a run folder (default of `out`: `report` in it), or a file of curves (default: NAME-report here).
    """
    source = Path(source)
    out = out or (Path(f"{source.stem}-report") if source.is_file() else source / "report")
    if out.exists() and not out.is_dir():
        raise UserError(f"{out}: the report goes into a folder, and this is a file; give another --out")
    report = make(source)
    pngs = figures.draw_all(report.charts)
    html = report.page()

    (out / "figures").mkdir(parents=True, exist_ok=True)
    for name, png in pngs.items():
        write_beside(out / "figures" / name, png)
    for chart in report.charts:
        write_beside(out / "figures" / f"{chart.name}.csv", chart.csv())
    write_beside(out / "study.json", json.dumps(report.values, indent=1, ensure_ascii=False, allow_nan=False) + "\n")
    write_beside(out / "report.html", html)
    _print_summary(report, out, len(pngs))
    return out


def make(source: Path) -> Report:
    """UserError names what is missing or malformed in `source`."""
    study = curve_report.read(source) if source.is_file() else read_study(source)
    held = {run.name: held_out.predict(run) for run in study.rl}
    values = contents(study)
    return Report(study, values, charts.build(study, held), {"headline": findings.headline(study), "held": held})


def contents(study: Study) -> dict[str, Any]:
    """What study.json holds."""
    return as_json(study) | {
        "answers": plain(answers(study)),
        "findings": findings.findings(study),
        "not_shown": not_shown(study),
        "versions": versions(),
    }


def versions() -> dict[str, str]:
    """Packages as installed where the report is written; read from their metadata, none is imported."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def _print_summary(report: Report, out: Path, n_figures: int) -> None:
    console = make_console()
    study = report.study
    title = Text(f"{study.name}: RL from each start, scores in percent ± standard error")
    table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD)
    for name in ("start", "regime", "first", "last", "gain", "SFT alone*", "fit"):
        table.add_column(name, justify="left" if name in ("start", "regime", "fit") else "right", no_wrap=name != "fit")
    for run in study.rl:
        first, last, alone = (
            "-" if value is None else f"{value:.1f}"
            for value in (run.first and run.first.score, run.last and run.last.score, run.sft_equal.value)
        )
        gain = "-" if run.gain.value is None else f"{run.gain.value:+.1f} ± {run.gain.se:.1f}"
        table.add_row(
            Text(run.label), run.start_regime or "-", first, last, gain, alone, ceiling_text(run).replace("\n", ", ")
        )
    if study.rl:
        console.print(table)
        console.print("* score of the SFT run at the same total training compute", style="dim")
    console.print(report.words["headline"], highlight=False, markup=False)
    missing = len(report.values["not_shown"])
    console.print(
        f"What this does not show: {missing} {'point' if missing == 1 else 'points'} in the report.", highlight=False
    )
    console.print(
        f"Wrote {out / 'report.html'}, {out / 'study.json'} and {n_figures} figures with their tables in {out / 'figures'}.",
        highlight=False,
        markup=False,
        soft_wrap=True,
    )
