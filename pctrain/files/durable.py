"""Files that survive a kill: written complete and then renamed, or appended line by line. And values as plain JSON."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from pctrain.common.errors import UserError


def write_atomically(path: Path, content: str | bytes) -> None:
    """Write a file completely or not at all, by way of a temporary file next to it. Text is written as UTF-8."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_bytes(content.encode() if isinstance(content, str) else content)
    fsync(temporary)
    os.replace(temporary, path)
    fsync(path.parent)


def fsync(path: Path) -> None:
    """Bring a file's bytes, or a folder's names, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256(file: Path) -> str:
    """Return the sha256 of a file's bytes, in hex. Raises OSError if it cannot be read."""
    with open(file, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def fingerprint(file: Path) -> str:
    """Return the sha256 of an input file's bytes, in hex. Raises UserError if it cannot be read."""
    try:
        return sha256(file)
    except OSError as error:
        raise UserError(f"input file {file}: {error.strerror}; check the path in the config") from None


def cut_torn_line(file: Path) -> None:
    """Truncate a file, if it exists, to its last newline: a process died while it wrote the rest."""
    if not file.exists():
        return
    try:
        data = file.read_bytes()
    except OSError as error:
        raise UserError(
            f"{file}: cannot be read ({error.strerror}); put the file back, or set another run.dir"
        ) from None
    if not data.endswith(b"\n"):
        os.truncate(file, data.rfind(b"\n") + 1)


def rewrite_lines(file: Path, keep: Callable[[list[str]], list[str]]) -> None:
    """Replace a file, if it exists, by `keep(its lines with their newlines)`, completely or not at all."""
    if not file.exists():
        return
    try:
        # str.splitlines would also split at U+2028, which JSON strings may contain.
        with open(file, encoding="utf-8", newline="\n") as stream:
            lines = list(stream)
    except UnicodeDecodeError as error:
        raise UserError(f"{file}: not UTF-8 at byte {error.start + 1}; fix it, or set another run.dir") from None
    kept = keep(lines)
    if kept != lines:
        write_atomically(file, "".join(kept))


def plain(value: Any) -> Any:
    """Return JSON's own types for mappings, dataclasses, sequences, paths, and NumPy and torch scalars.

    NaN and infinities become None.
    """
    if value is None or isinstance(value, (str, bool, int)):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return plain(dataclasses.asdict(value))
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, Path):
        return str(value)
    if hasattr(value, "item"):
        return plain(value.item())
    raise TypeError(f"{value!r} ({type(value).__name__}) cannot be written as JSON")


def json_line(values: Any) -> str:
    """Return a value as one line of JSON."""
    return json.dumps(values, ensure_ascii=False, allow_nan=False) + "\n"
