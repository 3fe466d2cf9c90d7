"""Trajectories and problems from JSONL files, one JSON object a line."""

from __future__ import annotations

import json
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pctrain.config import FieldsConfig
from pctrain.errors import UserError


@dataclass(frozen=True)
class Record:
    """One problem. `id` is "<file name>:<line>" unless the record has an `id` of its own."""

    id: str
    prompt: str
    response: str | None = None
    answer: str | None = None


def read_records(path: Path | str, fields: FieldsConfig, need: Collection[str]) -> list[Record]:
    """All records of a JSONL file, in the order of the file.

    Args:
        path: JSONL file, UTF-8. Blank lines are passed over.
        fields: names the fields.
        need: what every record must have beside the prompt: "response", "answer" or both. A field that is not needed is read where it
            is well-formed and is None otherwise.
    Raises:
        UserError: missing file, not UTF-8, malformed JSON, not an object, a needed field missing, empty or not text (with file and
            line); no record at all. An answer may also be a number.
    """
    need = {need} if isinstance(need, str) else set(need)
    if not need <= {"prompt", "response", "answer"}:
        raise ValueError(f"need: expected prompt, response or answer, got {sorted(need)}")
    path = Path(path)
    records = []
    for number, line in enumerate(_read_bytes(path).removeprefix(b"\xef\xbb\xbf").split(b"\n"), start=1):
        if line.strip():
            records.append(_record(_parse(line, path, number), path, number, fields, need))
    if not records:
        raise UserError(f"{path}: the data set is empty; expected one JSON object a line with the field {fields.prompt or 'prompt'!r}")
    return records


def _read_bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise UserError(f"data file {path} does not exist") from None
    except OSError as error:
        raise UserError(f"data file {path} cannot be read: {error.strerror}") from None


def _parse(line: bytes, path: Path, number: int) -> dict[str, Any]:
    try:
        value = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise UserError(f"{path}:{number}: not UTF-8 at byte {error.start + 1} of the line; save the file as UTF-8") from None
    except json.JSONDecodeError as error:
        raise UserError(f"{path}:{number}: malformed JSON at column {error.colno}: {error.msg}") from None
    except (RecursionError, ValueError) as error:  # nested too deep; an integer of thousands of digits
        raise UserError(f"{path}:{number}: malformed JSON: {error}") from None
    if not isinstance(value, dict):
        raise UserError(f"{path}:{number}: expected a JSON object, got {_kind(value)}")
    return value


def _record(value: dict[str, Any], path: Path, number: int, fields: FieldsConfig, need: set[str]) -> Record:
    where = f"{path}:{number}"
    texts = {
        name: _text(value, field, where, needed=name in need or name == "prompt", numbers=name == "answer")
        for name in ("prompt", "response", "answer")
        for field in [getattr(fields, name) or name]
    }
    own = value.get("id")
    named = isinstance(own, (str, int)) and not isinstance(own, bool) and own != ""
    return Record(id=str(own) if named else f"{path.name}:{number}", **texts)


def _text(value: dict[str, Any], field: str, where: str, *, needed: bool, numbers: bool) -> str | None:
    content = value.get(field)
    if numbers and isinstance(content, (int, float)) and not isinstance(content, bool):
        content = str(content)
    problem = None
    if field not in value:
        problem = f"the record has no field {field!r} (it has: {', '.join(sorted(value)) or 'none'})"
    elif not isinstance(content, str):
        problem = f"field {field!r}: expected a string{' or a number' if numbers else ''}, got {_kind(content)}"
    elif not content.strip():
        problem = f"field {field!r} is empty"
    elif not _encodable(content):
        problem = f"field {field!r} holds half of a surrogate pair (\\ud800 to \\udfff), which is no text"
    if problem is None:
        return content
    if needed:
        raise UserError(f"{where}: {problem}")
    return None


def _encodable(text: str) -> bool:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _kind(value: Any) -> str:
    kinds = {dict: "an object", list: "a list", str: "a string", bool: "true or false", int: "a number", float: "a number"}
    return kinds.get(type(value), "null")
