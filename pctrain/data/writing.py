"""Records into files: the form by the suffix, a batch in memory at a time, written beside and renamed."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from pctrain.durable import fsync, plain
from pctrain.errors import UserError


def write_records(path: Path | str, records: Iterable[dict[str, Any]]) -> int:
    """Writes the records and returns how many there were. `path` is there whole or not at all.

    NaN and infinities become null: JSON has no word for them.
    """
    path = Path(path)
    with _beside(path) as stream:
        return _write_lines(stream, records)


@contextmanager
def _beside(path: Path) -> Iterator[IO[bytes]]:
    temporary = path.with_name(path.name + ".tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as stream:
            yield stream
        fsync(temporary)
        os.replace(temporary, path)
        fsync(path.parent)
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror}") from None
    finally:
        temporary.unlink(missing_ok=True)


def _write_lines(stream: IO[bytes], records: Iterable[dict[str, Any]]) -> int:
    count = 0
    for record in records:
        stream.write(_line(record))
        count += 1
    return count


def _line(record: dict[str, Any]) -> bytes:
    record = plain(record)
    try:
        return json.dumps(record, ensure_ascii=False, allow_nan=False).encode() + b"\n"
    except UnicodeEncodeError:  # half of a surrogate pair can stand in a file as an escape alone
        return json.dumps(record, allow_nan=False).encode() + b"\n"
