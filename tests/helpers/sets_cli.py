"""What the tests of the commands on trajectory sets share: records in a file, a command as a user types it, and what it left."""

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
    """What `pctrain data ARGUMENTS` printed; it must succeed."""
    status, printed, errors = run_status(*arguments)
    assert status == 0, errors
    return printed


def refused(*arguments: object) -> str:
    """The message of `pctrain data ARGUMENTS`, which must refuse."""
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
