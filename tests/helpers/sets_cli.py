"""Helpers for tests of the trajectory-set commands: write records, run a command, read its output."""

from __future__ import annotations

import contextlib
import io
import json
from collections.abc import Iterable
from pathlib import Path

from pctrain.cli.main import main


def write(path: Path, records: Iterable[dict]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def run(*arguments: object) -> str:
    """Run `pctrain data ARGUMENTS`, which must succeed; return its output."""
    status, printed, errors = run_status(*arguments)
    assert status == 0, errors
    return printed


def refused(*arguments: object) -> str:
    """Run `pctrain data ARGUMENTS`, which must refuse; return its message."""
    status, _, errors = run_status(*arguments)
    assert status == 2, f"status {status}: {errors}"
    return errors


def run_status(*arguments: object) -> tuple[int, str, str]:
    printed, errors = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(errors):
        status = main(["data", *map(str, arguments)])
    return status, printed.getvalue(), errors.getvalue()


def manifest(out: Path) -> dict:
    return json.loads(out.with_name(out.name + ".manifest.json").read_text())


def dropped(out: Path) -> list[dict]:
    return read(out.with_name(out.name + ".dropped.jsonl"))
