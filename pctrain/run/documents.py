"""The JSON documents of a run folder: start.json, summary.json and ranks.json."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypedDict

from pctrain.common.errors import UserError
from pctrain.files import json_file
from pctrain.files.durable import plain, write_atomically
from pctrain.run.names import RANKS, START, SUMMARY

ROLES = ("early", "stable", "overfit", "none")


class Start(TypedDict):
    """The switch point of an RL run, in start.json."""

    start_step: int  # SFT step that RL started from
    role: str  # one of ROLES
    eflops_sft: float  # compute of SFT up to there


class Summary(TypedDict):
    """The end of a run, in summary.json."""

    summary: dict[str, Any]
    next_command: str


def write_start(folder: Path, values: Mapping[str, Any]) -> None:
    """Write start.json: start_step, role, sft_run, eflops_sft."""
    _write(folder / START, values)


def read_start(folder: Path) -> Start:
    """Return the start of an RL run. Raises UserError if start.json is missing or malformed."""
    file = folder / START
    if not file.is_file():
        raise UserError(
            f"{file}: missing; give the folder of an RL run, whose {START} says which checkpoint it started from"
        )
    values = json_file.read_object(file, "Take the folder from its source again")
    if values.get("role") not in ROLES:
        raise UserError(f"{file}: `role` must be one of {', '.join(ROLES)}, found {values.get('role')!r:.60}")
    step = values.get("start_step")
    if isinstance(step, bool) or not isinstance(step, int):
        raise UserError(f"{file}: `start_step` must be a whole number, found {step!r:.60}")
    eflops = values.get("eflops_sft")
    if isinstance(eflops, bool) or not isinstance(eflops, (int, float)) or not abs(eflops) < 1e300:
        raise UserError(f"{file}: `eflops_sft` must be a finite number, found {eflops!r:.60}")
    return {"start_step": step, "role": str(values["role"]), "eflops_sft": float(eflops)}


def is_finished(folder: Path) -> bool:
    """Return whether a run has finished: it has a summary.json."""
    return (folder / SUMMARY).exists()


def write_summary(folder: Path, summary: Mapping[str, Any], next_command: str) -> Summary:
    """Write summary.json, and return its content."""
    values: Summary = {"summary": plain(summary), "next_command": next_command}
    _write(folder / SUMMARY, values)
    return values


def read_summary(folder: Path) -> Summary:
    """Return the content of summary.json. Raises UserError if it is missing or malformed."""
    file = folder / SUMMARY
    advice = "Delete it, and the same command writes it again"
    values = json_file.read_object(file, advice)
    summary, next_command = values.get("summary"), values.get("next_command")
    if not isinstance(summary, dict) or not isinstance(next_command, str):
        raise UserError(f"{file} is not the summary of a run. {advice}")
    return {"summary": summary, "next_command": next_command}


def write_ranks(folder: Path, values: Mapping[str, Any]) -> None:
    """Write ranks.json: how long each rank worked in each phase."""
    _write(folder / RANKS, values)


def has_ranks(folder: Path) -> bool:
    """Return whether a folder has a ranks.json: the run had several ranks."""
    return (folder / RANKS).exists()


def read_slowest_ranks(folder: Path) -> list[dict[str, Any]]:
    """Return the slowest rank of each phase: phase, rank, place (texts), seconds, others (numbers).

    Raises:
        UserError: ranks.json is missing or malformed.
    """
    file = folder / RANKS
    advice = "The run writes it again when it is started"
    rows = json_file.read_object(file, advice).get("slowest")
    if not isinstance(rows, list):
        raise UserError(f"{file}: `slowest` must be a list, found {rows!r:.60}. {advice}")
    for row in rows:
        texts = isinstance(row, dict) and all(row.get(key) is not None for key in ("phase", "rank", "place"))
        if not texts or not all(_is_number(row.get(key)) for key in ("seconds", "others")):
            raise UserError(
                f"{file}: `slowest` must list phase, rank, place, seconds and others of each phase, found {row!r:.60}. "
                f"{advice}"
            )
    return [{**row, **{key: str(row[key]) for key in ("phase", "rank", "place")}} for row in rows]


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 1e300


def _write(file: Path, values: Mapping[str, Any]) -> None:
    write_atomically(file, json.dumps(plain(values), indent=1) + "\n")
