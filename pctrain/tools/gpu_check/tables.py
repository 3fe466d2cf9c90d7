"""Results as tables: for the terminal, for the README and docs/gpu.md, and next to a baseline."""

from __future__ import annotations

from collections.abc import Sequence

from pctrain.tools.gpu_check.phase_table import NAMES, PHASES
from pctrain.tools.gpu_check.results import FAIL, INFO, PASS, SKIP, Result, Row
from pctrain.tools.gpu_check.runner import Verdict

MOST_FIGURES = 4  # of a phase, in the README's table


def terminal(verdicts: Sequence[Verdict], points: dict[str, list[Row]]) -> str:
    """Return the table that a run ends with; a reason of several lines follows below it."""
    rows = [("", "phase", "seconds", "points", "")]
    for verdict in verdicts:
        judged = [row for row in points[verdict.phase] if row["status"] in (PASS, FAIL)]
        passed = sum(row["status"] == PASS for row in judged)
        counted = f"{passed}/{len(judged)}" if judged else ""
        first = (verdict.reason.splitlines() or [""])[0]
        rows.append((verdict.status, verdict.phase, f"{verdict.seconds:.1f}", counted, first))
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    lines = ["  ".join([*map(str.ljust, row[:4], widths), row[4]]).rstrip() for row in rows]
    return "\n".join([*lines, *_details(verdicts, points)])


def _details(verdicts: Sequence[Verdict], points: dict[str, list[Row]]) -> list[str]:
    """Return what the table has no room for: reasons of several lines, and the points that failed."""
    details = []
    for verdict in verdicts:
        if verdict.status == FAIL and "\n" in verdict.reason:
            details.append(f"\n{verdict.phase}: {verdict.reason}")
        failed = [row for row in points[verdict.phase] if row["status"] == FAIL]
        details += [f"{FAIL}: {verdict.phase}: {point_line(row)}" for row in failed]
    return details


def point_line(row: Row) -> str:
    """Return a point as text: name, figure, bound and note."""
    parts = [row["point"]]
    if "value" in row:
        parts.append(figure(row) + (f" (expected {row['limit']})" if row.get("limit") else ""))
    if row.get("note"):
        parts.append(row["note"])
    return ": ".join(parts)


def figure(row: Row) -> str:
    """Return a point's value with its unit."""
    return f"{row['value']:.4g} {row.get('unit', '')}".strip()


# ---- markdown --------------------------------------------------------------------------------------------------------


def markdown(results: Sequence[Result]) -> str:
    """Return the README's table of what ran on a GPU, and docs/gpu.md's table of all figures."""
    by_phase = {result.phase: result for result in results}
    ordered = [by_phase[name] for name in NAMES if name in by_phase]
    lines = ["| on a GPU | state | figures |", "|---|---|---|"]
    for phase in PHASES:
        result = by_phase.get(phase.name)
        lines.append(f"| {phase.feature} | {_state(result)} | {_figures(result)} |")
    lines += ["", *_machines(ordered), "", "| phase | point | figure | bound | state |", "|---|---|---|---|---|"]
    for result in ordered:
        for row in result.points:
            value = figure(row) if "value" in row else ""
            texts = (result.phase, row["point"], value or row.get("note", ""), row.get("limit", ""), row["status"])
            lines.append(f"| {' | '.join(map(_cell, texts))} |")
    return "\n".join(lines)


def _state(result: Result | None) -> str:
    if result is None:
        return "not yet run"
    status, reason = result.verdict["status"], _cell((result.verdict["reason"].splitlines() or [""])[0])
    if status == SKIP:
        return f"not yet run: {reason}"
    where = f"{_machine(result.about)}, {result.verdict['time'][:10]}"
    if result.about.get("mode") == "cpu":
        where = f"a CPU only ({where})"
    return f"run on {where}" if status == PASS else f"**failed** on {where}: {reason}"


def _figures(result: Result | None) -> str:
    """Return the count of passed points, and the figures without a bound: the rates."""
    if result is None or result.verdict["status"] == SKIP:
        return ""
    judged = [row for row in result.points if row["status"] in (PASS, FAIL)]
    shown = [row for row in result.points if "value" in row and (row["status"] == INFO or len(judged) <= MOST_FIGURES)]
    passed = sum(row["status"] == PASS for row in judged)
    figures = [f"{row['point']} {figure(row)}" for row in shown[:MOST_FIGURES]]
    return _cell("; ".join([f"{passed} of {len(judged)} points pass", *figures]))


def _machine(about: Row) -> str:
    driver = f", driver {about['driver']}" if about.get("driver") else ""
    return f"{about.get('machine', 'an unnamed machine')}{driver}"


def _machines(results: Sequence[Result]) -> list[str]:
    """Return one line per machine and set of versions."""
    lines = []
    for result in results:
        versions = ", ".join(f"{name} {version}" for name, version in result.about.get("versions", {}).items())
        line = f"Measured on {_machine(result.about)}, {result.verdict['time'][:10]}, with {versions}."
        if line not in lines:
            lines.append(line)
    return lines


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def side_by_side(new: Sequence[Result], old: Sequence[Result]) -> str:
    """Return the figures of two files next to each other with their ratios, and the points whose state changed."""
    before = {(result.phase, row["point"]): row for result in old for row in result.points}
    lines = ["| phase | point | new | baseline | ratio | state |", "|---|---|---|---|---|---|"]
    for result in new:
        for row in result.points:
            other = before.pop((result.phase, row["point"]), None)
            line = _compared(row, other)
            if line is not None:
                lines.append(f"| {_cell(result.phase)} | {line} |")
    for (phase, point), row in before.items():
        value = figure(row) if "value" in row else ""
        lines.append(f"| {_cell(phase)} | {_cell(point)} |  | {_cell(value)} |  | absent, was {row['status']} |")
    return "\n".join(lines)


def _compared(row: Row, other: Row | None) -> str | None:
    """Return a point's cells next to its baseline, or None if it has no figure and the same state as before."""
    new, old = figure(row) if "value" in row else "", figure(other) if other and "value" in other else ""
    ratio = f"{row['value'] / other['value']:.3g}" if new and other and old and other["value"] else ""
    was = other["status"] if other else "absent"
    changed = row["status"] != was
    if not new and not changed:
        return None
    state = f"{row['status']}, was {was}" if changed else row["status"]
    return " | ".join(map(_cell, (row["point"], new, old, ratio, state)))
