"""`pctrain show RUN --step N`: print the rollouts of an RL step in the terminal, prompt by prompt."""

from __future__ import annotations

from itertools import groupby
from pathlib import Path
from types import NoneType
from typing import Any, Literal

from rich.console import Console
from rich.markup import escape
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from pctrain.common.errors import UserError
from pctrain.common.progress import make_console
from pctrain.run.records import read_rollouts, rollout_files

_NUMBER = (int, float)
# The fields that a line must have to be shown, with their types; `advantage` and `prefix` may be missing.
_FIELDS: dict[str, type | tuple[type, ...]] = {
    "group": int,
    "id": str,
    "prompt": str,
    "response": str,
    "answer": str,
    "reward": _NUMBER,
    "cause": str,
    "tokens": int,
    "finish": str,
    "kept": bool,
    "why": str,
    "advantage": (*_NUMBER, NoneType),
    "prefix": (str, NoneType),
}


def main(run: Path, step: int | None, prompts: int, dropped: bool) -> None:
    """Print every rollout of `prompts` prompts: reward, cause, advantage, length and text.

    `step` None is the newest step. `dropped` includes prompts that dynamic sampling dropped.
    """
    file = _file_of(run, step)
    groups = [list(rows) for _, rows in groupby(_read(file), key=lambda row: row["group"])]
    shown = [rows for rows in groups if dropped or rows[0]["kept"]]
    console = make_console()
    for rows in shown[:prompts]:
        _show(console, rows)
    kept = sum(rows[0]["kept"] for rows in groups)
    rewards = [row["reward"] for rows in groups for row in rows]
    reward = sum(rewards) / len(rewards)
    console.print(
        f"{file}: {len(groups)} prompts, {kept} kept, {len(groups) - kept} dropped; mean reward {reward:.3f}",
        markup=False,
        soft_wrap=True,
    )
    if len(shown) > prompts:
        console.print(f"{len(shown) - prompts} more prompts: show them with --prompts={len(shown)}", markup=False)
    if kept < len(groups) and not dropped:
        console.print("dropped prompts are hidden: show them with --dropped", markup=False)


def _file_of(run: Path, step: int | None) -> Path:
    steps = rollout_files(run)
    if not steps:
        raise UserError(f"{run} has no rollouts (expected rollouts/step-N.jsonl); name the folder of an RL run")
    chosen = max(steps) if step is None else step
    if chosen not in steps:
        near = min(steps, key=lambda known: abs(known - chosen))
        raise UserError(
            f"{run}: no rollouts of step {chosen}; the folder has those of {len(steps)} steps from {min(steps)} to "
            f"{max(steps)}, the nearest is {near}"
        )
    return steps[chosen]


def _read(file: Path) -> list[dict[str, Any]]:
    rows = [_checked(row, place) for row, place in read_rollouts(file)]
    if not rows:
        raise UserError(f"{file} is empty: the step has no rollouts; name another step")
    return rows


def _checked(row: dict[str, Any], place: str) -> dict[str, Any]:
    if not all(isinstance(row.get(key), kind) for key, kind in _FIELDS.items()):
        raise UserError(
            f"{place}: not a rollout; expected the fields {', '.join(_FIELDS)}. "
            "The file was written by an older version, or changed: name another step"
        )
    return row


def _show(console: Console, rows: list[dict[str, Any]]) -> None:
    first = rows[0]
    right = sum(row["reward"] > 0.5 for row in rows)
    title = f"{escape(first['id'])}   answer {escape(first['answer'])}   {right} of {len(rows)} right"
    if not first["kept"]:
        title += f"   dropped: {escape(first['why'])}"
    table = Table(box=None, padding=(0, 1), expand=True)
    columns: tuple[tuple[str, Literal["left", "right"]], ...] = (
        ("reward", "right"),
        ("advantage", "right"),
        ("cause", "left"),
        ("tokens", "right"),
    )
    for name, justify in columns:
        table.add_column(name, justify=justify)
    table.add_column("response", ratio=1, overflow="fold")
    for row in rows:
        colour = "green" if row["reward"] > 0.5 else "red"
        advantage = "" if row.get("advantage") is None else f"{row['advantage']:+.3f}"
        text = Text(row["response"])  # a model's text is not markup
        if row.get("prefix"):
            text = Text(row["prefix"], style="dim italic") + text
        cut = " (cut)" if row["finish"] == "length" else ""
        table.add_row(Text(f"{row['reward']:g}", style=colour), advantage, row["cause"], f"{row['tokens']}{cut}", text)
    console.print(Panel(Text(first["prompt"]), title=title, title_align="left"))
    console.print(table)
    console.print()
