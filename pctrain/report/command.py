"""`pctrain report`: report what a study, a run or a file of curves shows, and what it does not show.

The report is one HTML page, PNG and CSV files of its charts, and study.json. answers.py, findings.py and not_shown.py
write the sentences, charts/ computes the charts, page.py renders the page; watch.py serves it during a run.
"""

from __future__ import annotations

import contextlib
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
from pctrain.files.durable import plain, write_atomically
from pctrain.report import charts, curve_report, figures, findings, held_out, page
from pctrain.report.answers import answers
from pctrain.report.looks import ceiling_text
from pctrain.report.not_shown import not_shown
from pctrain.report.reading import read_study
from pctrain.report.study_data import RLRun, Study, as_json

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
    """The contents of a report, made from one reading of the files."""

    study: Study
    values: dict[str, Any]  # study.json
    charts: list[charts.Chart]
    words: dict[str, Any]  # headline and held: what the page's template takes besides the numbers

    def page(self, live: dict[str, Any] | None = None) -> str:
        """Return the HTML page; `live` is for a page that is served while the run continues."""
        return page.render(self.study, self.values, self.charts, **self.words, live=live)

    def sections(self) -> dict[str, str]:
        """Return the parts of the page that a refresh replaces."""
        return page.sections(self.study, self.values, self.charts, **self.words)


def main(source: Path | str, out: Path | None = None) -> Path:
    """Write report.html, figures/*.png, figures/*.csv and study.json, print the summary, and return their folder.

    `source` is a study folder, a run folder or a file of curves. The default of `out` is `report` in the folder, or
    NAME-report in the working directory for a file.
    """
    source = Path(source)
    out = out or (Path(f"{source.stem}-report") if source.is_file() else source / "report")
    if out.exists() and not out.is_dir():
        raise UserError(f"{out}: is a file, and the report needs a folder. Give another --out.")
    report = make(source)
    pngs = figures.draw_all(report.charts)
    html = report.page()

    (out / "figures").mkdir(parents=True, exist_ok=True)
    for name, png in pngs.items():
        write_atomically(out / "figures" / name, png)
    for chart in report.charts:
        write_atomically(out / "figures" / f"{chart.name}.csv", chart.csv())
    write_atomically(
        out / "study.json", json.dumps(report.values, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
    )
    write_atomically(out / "report.html", html)
    _print_summary(report, out, len(pngs))
    return out


def make(source: Path) -> Report:
    """Make the report of `source`. The UserError names what is missing or malformed in it."""
    study = curve_report.read(source) if source.is_file() else read_study(source)
    held = {run.name: held_out.predict(run) for run in study.rl}
    values = contents(study)
    return Report(study, values, charts.build(study, held), {"headline": findings.headline(study), "held": held})


def contents(study: Study) -> dict[str, Any]:
    """Return the contents of study.json."""
    return as_json(study) | {
        "answers": plain(answers(study)),
        "findings": findings.findings(study),
        "not_shown": not_shown(study),
        "versions": versions(),
    }


def versions() -> dict[str, str]:
    """Return the installed versions of PACKAGES from their metadata, without importing them."""
    installed = {"python": platform.python_version()}
    for name in PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            installed[name] = metadata.version(name)
    return installed


def _print_summary(report: Report, out: Path, n_figures: int) -> None:
    console = make_console()
    study = report.study
    title = Text(f"{study.name}: RL from each start, scores in percent, gain ± standard error")
    table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD)
    for name in ("start", "regime", "first", "last", "gain", "SFT alone*", "fit"):
        table.add_column(name, justify="left" if name in ("start", "regime", "fit") else "right", no_wrap=name != "fit")
    for run in study.rl:
        table.add_row(*_summary_row(run))
    if study.rl:
        console.print(table)
        console.print("* score of the SFT run at the same total training compute", style="dim")
    console.print(report.words["headline"], highlight=False, markup=False)
    limits = len(report.values["not_shown"])
    console.print(
        f"The report lists {limits} {'thing' if limits == 1 else 'things'} that these runs do not show.",
        highlight=False,
    )
    console.print(
        f"Wrote {out / 'report.html'}, {out / 'study.json'} and {n_figures} figures with their tables in "
        f"{out / 'figures'}.",
        highlight=False,
        markup=False,
        soft_wrap=True,
    )


def _summary_row(run: RLRun) -> list[Text | str]:
    gain = run.gain
    return [
        Text(run.label),
        run.start_regime or "-",
        _one_decimal(run.first.score if run.first else None),
        _one_decimal(run.last.score if run.last else None),
        "-" if gain.value is None else f"{gain.value:+.1f} ± {gain.se:.1f}",
        _one_decimal(run.sft_equal.value),
        ceiling_text(run).replace("\n", ", "),
    ]


def _one_decimal(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"
