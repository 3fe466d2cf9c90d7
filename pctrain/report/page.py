"""Render report.html: one file with everything inside, which opens from the disk and loads nothing.

All text from files is treated as hostile. Three layers keep it from running as code: the template escapes it, chart
texts are escaped once more for plotly, and the page's Content-Security-Policy allows only the two scripts whose hashes
it names.
"""

from __future__ import annotations

import base64
import functools
import hashlib
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jinja2
import yaml
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from pctrain.compute.ledger import PHASES
from pctrain.report.charts.chart import Chart
from pctrain.report.held_out import ForecastTest
from pctrain.report.looks import PALETTE, PHASE_NAMES, REGIME_COLOURS, ceiling_text, flops_text, run_looks
from pctrain.report.study_data import Study

SECTIONS = ("summary", "charts", "tables", "rollouts", "config")  # template blocks, each in an element section-NAME
_WAITING = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'"><meta name="color-scheme" content="light dark">
<meta http-equiv="refresh" content="{{ seconds }}"><title>{{ name|e }}: waiting</title></head>
<body><h1>{{ name|e }}</h1><p>Waiting for the first numbers of the run.</p><p>{{ why|e }}</p></body></html>
"""
OPENING = 300  # characters of an answer shown at once, up to the end of a sentence; the rest is folded
MAX_CARDS = 6  # with more runs than this the page has the table only, no cards


def render(study: Study, values: dict[str, Any], charts: list[Chart], **more: Any) -> str:
    """Return the page.

    Args:
        study: the study that the report is about.
        values: the contents of study.json.
        charts: the charts in their order.
        more: the `headline`, the forecasts `held` ({run name: ForecastTest or None}) and, if the page is served and
            polls for newer data, `live` ({tag, read, seconds, note}).
    """
    variables = _variables(study, values, charts, **more)
    environment = _environment()
    script, css = (environment.get_template(name).render() for name in ("report.page.js.j2", "report.css.j2"))
    plotly = _plotly()
    connect = "; connect-src 'self'" if variables["live"] else ""
    # Plotly sets style attributes and adds an empty style element, which it fills through the rules API.
    policy = (
        f"default-src 'none'; script-src {_hash(plotly)} {_hash(script)}; style-src {_hash(css)} {_hash('')}; "
        f"style-src-attr 'unsafe-inline'; img-src data: blob:; base-uri 'none'; form-action 'none'{connect}"
    )
    return environment.get_template("report.html.j2").render(
        variables,
        policy=policy,
        css=css,
        script=script,
        plotly=plotly,
        data=page_data(charts, variables["live"]),
        plotly_styles=_style_ids(),
    )


def sections(study: Study, values: dict[str, Any], charts: list[Chart], **more: Any) -> dict[str, str]:
    """Return {name: HTML} of the parts of the page that a refresh replaces."""
    template = _environment().get_template("report.html.j2")
    context = template.new_context(_variables(study, values, charts, **more))
    return {name: "".join(template.blocks[name](context)) for name in SECTIONS}


def waiting(name: str, why: str, seconds: float) -> str:
    """Return a page that reloads itself, for a run that has nothing to show yet."""
    return _environment().from_string(_WAITING).render(name=name, why=why, seconds=int(seconds))


def page_data(charts: list[Chart], live: dict[str, Any] | None) -> dict[str, Any]:
    """Return the JSON that the page's scripts draw from."""
    return {
        "charts": {chart.name: {"title": chart.title, "spec": chart.spec, "csv": chart.csv()} for chart in charts},
        "palette": PALETTE,
        "regimes": REGIME_COLOURS,
        "live": live,
    }


def _variables(
    study: Study,
    values: dict[str, Any],
    charts: list[Chart],
    *,
    headline: str,
    held: dict[str, ForecastTest | None],
    live: dict[str, Any] | None = None,
) -> dict[str, Any]:
    phases = [phase for phase in PHASES if phase in values["ledger"]]
    return {
        "study": study,
        "values": values,
        "charts": charts,
        "headline": headline,
        "held": held,
        "live": live,
        "cards": study.rl if len(study.rl) <= MAX_CARDS else [],
        "looks": run_looks(study),
        "samples": any(run.samples for run in study.rl),
        "phases": phases,
        "phase_names": PHASE_NAMES,
        "measuring": [phase for phase in phases if PHASES[phase].axis is None],
        "exact_flops": sum(row["exact_flops"] for row in values["ledger"].values()),
        "ceiling_text": ceiling_text,
    }


@functools.cache
def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"),
        undefined=jinja2.StrictUndefined,
        autoescape=lambda name: name == "report.html.j2",
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.policies["json.dumps_kwargs"] = {"sort_keys": False, "allow_nan": False, "separators": (",", ":")}
    filters: dict[str, Callable[..., Any]] = {
        "flops": _flops,
        "eflops": flops_text,
        "opening": _opening,
        "numbers": _numbers,
    }
    environment.filters.update(filters)
    return environment


def _flops(flops: float) -> str:
    return flops_text(flops / 1e18)


def _numbers(value: object) -> str:
    return yaml.safe_dump(value, sort_keys=False, allow_unicode=True, width=100)


def _opening(text: str) -> tuple[str, str]:
    """Split a long text after a sentence, so that a card shows what fits in it: (opening, rest)."""
    if len(text) <= 1.5 * OPENING:
        return text, ""
    cut = text.rfind(". ", OPENING // 4, OPENING)
    if cut < 0:
        cut = text.find(". ", OPENING)
    return (text[: cut + 1], text[cut + 1 :].strip()) if cut > 0 else (text, "")


@functools.cache
def _plotly() -> Markup:
    return Markup(get_plotlyjs().replace("\r\n", "\n"))  # line ends as a browser reads and hashes them


def _style_ids() -> list[str]:
    """Return the ids of style elements that plotly's bundle adds with text, unless an element of that id exists.

    Other versions of plotly may have none.
    """
    return re.findall(r'document\.getElementById\("([0-9a-f]{64})"\)', _plotly())


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
