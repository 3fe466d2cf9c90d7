"""`pctrain show RUN --step N`: the rollouts of an RL step in the terminal, prompt by prompt."""

from __future__ import annotations

from itertools import groupby
from pathlib import Path
from types import NoneType

from rich.console import Console
from rich.markup import escape
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from pctrain.common.errors import UserError
from pctrain.common.progress import make_console
from pctrain.run.records import read_rollouts, rollout_files

_NUMBER = (int, float)
# What a line must have to be shown; `advantage` and `prefix` may be missing.
_KINDS = {
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
    """Prints `prompts` prompts of step `step` (None: the newest) with every rollout: reward, cause, advantage, length, text."""
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
        console.print(f"{len(shown) - prompts} more prompts: --prompts={len(shown)}", markup=False)
    if kept < len(groups) and not dropped:
        console.print("dropped ones are not shown: --dropped", markup=False)


def _file_of(run: Path, step: int | None) -> Path:
    steps = rollout_files(run)
    if not steps:
        raise UserError(f"{run} holds no rollouts (rollouts/step-N.jsonl); name the folder of an RL run")
    chosen = max(steps) if step is None else step
    if chosen not in steps:
        near = min(steps, key=lambda known: abs(known - chosen))
        raise UserError(
            f"{run}: there are no rollouts of step {chosen}; there are {len(steps)}, from {min(steps)} to {max(steps)}, "
            f"the nearest is {near}"
        )
    return steps[chosen]


def _read(file: Path) -> list[dict]:
    rows = []
    for row, where in read_rollouts(file):
        if not all(isinstance(row.get(key), kind) for key, kind in _KINDS.items()):
            raise UserError(
                f"{where}: no rollout that can be shown; expected {', '.join(_KINDS)}. It was written by an older "
                "version, or changed"
            )
        rows.append(row)
    if not rows:
        raise UserError(f"{file} is empty: the step has no rollouts")
    return rows


def _show(console: Console, rows: list[dict]) -> None:
    first = rows[0]
    right = sum(row["reward"] > 0.5 for row in rows)
    title = f"{escape(first['id'])}   answer {escape(first['answer'])}   {right} of {len(rows)} right"
    if not first["kept"]:
        title += f"   dropped: {escape(first['why'])}"
    table = Table(box=None, padding=(0, 1), expand=True)
    for name, justify in (("reward", "right"), ("advantage", "right"), ("cause", "left"), ("tokens", "right")):
        table.add_column(name, justify=justify)
    table.add_column("response", ratio=1, overflow="fold")
    for row in rows:
        colour = "green" if row["reward"] > 0.5 else "red"
        advantage = "" if row.get("advantage") is None else f"{row['advantage']:+.3f}"
        text = Text(row["response"])  # what a model wrote is no markup
        if row.get("prefix"):
            text = Text(row["prefix"], style="dim italic") + text
        cut = " (cut)" if row["finish"] == "length" else ""
        table.add_row(Text(f"{row['reward']:g}", style=colour), advantage, row["cause"], f"{row['tokens']}{cut}", text)
    console.print(Panel(Text(first["prompt"]), title=title, title_align="left"))
    console.print(table)
    console.print()
