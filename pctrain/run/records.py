"""The records of a run, one JSON object per line: metrics.jsonl, ledger.jsonl and rollouts/step-N.jsonl.

A last line without its newline is being written, or was when the run was killed: readers leave it out.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from pctrain.common.errors import UserError
from pctrain.compute.ledger import PHASES
from pctrain.files import json_file
from pctrain.files.durable import rewrite_lines
from pctrain.run import checkpoints
from pctrain.run.config_file import Kind
from pctrain.run.names import LEDGER, LOG, METRICS, ROLLOUTS

KINDS = ("train", "val", "eval")
ADVICE = "Fix or delete the line, or set another run.dir"
_LOG_STEP = re.compile(r"^\S+ step\s+(\d{1,18})\b")
_ROLLOUTS_NAME = re.compile(r"step-(\d+)\.jsonl", re.ASCII)


def has_metrics(folder: Path) -> bool:
    """Return whether a folder has a metrics.jsonl."""
    return (folder / METRICS).is_file()


def has_ledger(folder: Path) -> bool:
    """Return whether a folder has a ledger.jsonl."""
    return (folder / LEDGER).is_file()


def read_metrics(folder: Path) -> Iterator[tuple[dict[str, Any], str]]:
    """Yield (line, "file:line") of metrics.jsonl; `kind` and `step` are checked.

    Raises:
        UserError: the file is missing, or a line is malformed.
    """
    file = Path(folder) / METRICS
    if not file.exists():
        raise UserError(
            f"{file}: missing. The run has recorded nothing yet; start it again with the same command, then ask again"
        )
    for row, where in json_file.read_lines(file, ADVICE, torn_end=True):
        if row.get("kind") not in KINDS:
            raise UserError(f"{where}: `kind` must be train, val or eval, found {row.get('kind')!r:.60}. {ADVICE}")
        if isinstance(row.get("step"), bool) or not isinstance(row.get("step"), int):
            raise UserError(f"{where}: `step` must be a whole number, found {row.get('step')!r:.60}. {ADVICE}")
        yield row, where


def read_values(folder: Path, kind: str, key: str) -> dict[int, float]:
    """Return {step: value} of one metric of a run folder; {} if the run has recorded nothing yet."""
    if not has_metrics(Path(folder)):
        return {}
    values: dict[int, float] = {}
    for row, where in read_metrics(folder):
        value = row.get(key)
        if row["kind"] != kind or value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise UserError(f"{where}: `{key}` must be a number, found {value!r:.60}. {ADVICE}")
        values[row["step"]] = value
    return values


def best_step(folder: Path, kind: Kind) -> int | None:
    """Return the step of the best checkpoint, the first of equals, or None if none was measured.

    The best one has the lowest validation loss (SFT) or the highest score (RL).
    """
    steps = {checkpoints.checkpoint_step(path) for path in checkpoints.list_checkpoints(folder)}
    if kind == "sft":
        losses = {step: value for step, value in read_values(folder, "val", "val_loss").items() if step in steps}
        return min(losses, key=lambda step: (losses[step], step), default=None)
    scores = {step: value for step, value in read_values(folder, "eval", "score").items() if step in steps}
    return max(scores, key=lambda step: (scores[step], -step), default=None)


def read_ledger(folder: Path) -> Iterator[tuple[dict[str, Any], str]]:
    """Yield (line, "file:line") of ledger.jsonl; `phase` is checked.

    Raises:
        UserError: the file is missing, or a line is malformed.
    """
    file = Path(folder) / LEDGER
    if not file.exists():
        raise UserError(f"{file}: missing. Every run folder has the ledger of its compute")
    for row, where in json_file.read_lines(file, ADVICE, torn_end=True):
        if row.get("phase") not in tuple(PHASES):
            raise UserError(f"{where}: `phase` must be one of {', '.join(PHASES)}, found {row.get('phase')!r:.60}")
        yield row, where


def rollout_files(folder: Path) -> dict[int, Path]:
    """Return {step: file} of the rollouts that a run has written."""
    files = {}
    for path in Path(folder).glob(f"{ROLLOUTS}/step-*.jsonl"):
        match = _ROLLOUTS_NAME.fullmatch(path.name)
        if match:
            files[int(match[1])] = path
    return files


def read_rollouts(file: Path) -> Iterator[tuple[dict[str, Any], str]]:
    """Yield (rollout, "file:line") of a file of `rollout_files`. Raises UserError for a malformed line."""
    return json_file.read_lines(file, "Name another step, or sample it again", torn_end=True)


def rewind(folder: Path, last: int) -> None:
    """Cut metrics.jsonl, ledger.jsonl, train.log and rollouts/ back to step `last`; -1 leaves nothing."""
    for name in (METRICS, LEDGER):
        rewrite_lines(folder / name, _until_step(folder / name, last))
    rewrite_lines(folder / LOG, lambda lines: _log_until(lines, last))
    for step, file in rollout_files(folder).items():
        if step > last:
            file.unlink()


def _until_step(file: Path, last: int) -> Callable[[list[str]], list[str]]:
    """Return a function that keeps the lines of steps up to `last`."""

    def keep(lines: list[str]) -> list[str]:
        return [line for number, line in enumerate(lines, 1) if _step_of_line(line, f"{file}:{number}") <= last]

    return keep


def _step_of_line(line: str, where: str) -> int:
    try:
        step = json_file.parse(line)["step"]
        return int(step)
    except (ValueError, KeyError, TypeError, OverflowError):
        raise UserError(f"{where}: expected a JSON object with `step`. {ADVICE}") from None


def _log_until(lines: list[str], last: int) -> list[str]:
    """Return the log up to the first line of a later step. Lines without a step belong to the line before them."""
    if last < 0:
        return []
    for index, line in enumerate(lines):
        match = _LOG_STEP.match(line)
        if match and int(match[1]) > last:
            return lines[:index]
    return lines
