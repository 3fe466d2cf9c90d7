"""JSON files: one reader, and one kind of error for everything that can be wrong with the bytes."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pctrain.common.errors import UserError


class MalformedJSON(ValueError):
    """Text that is not JSON, or that Python cannot hold. The message says what is wrong, and where if that is known."""


def parse(text: str | bytes) -> Any:
    """Return the value of a JSON text. Bytes must be UTF-8.

    Raises:
        MalformedJSON: the text is not JSON, nests too deeply, has a number of thousands of digits, or has an escape for
            half of a surrogate pair, which no file and no terminal can take.
    """
    try:
        text = text if isinstance(text, str) else text.decode("utf-8")
        value = json.loads(text)
        if "\\ud" in text.lower():
            json.dumps(value, ensure_ascii=False).encode()
    except UnicodeDecodeError as error:
        raise MalformedJSON(f"not UTF-8 at byte {error.start + 1}") from None
    except UnicodeEncodeError:
        raise MalformedJSON("a string has half of a surrogate pair") from None
    except json.JSONDecodeError as error:
        raise MalformedJSON(f"line {error.lineno}, column {error.colno}: {error.msg}") from None
    except RecursionError:
        raise MalformedJSON("it is nested too deeply") from None
    except ValueError as error:
        raise MalformedJSON(str(error)) from None
    return value


def read_object(file: Path, advice: str = "") -> dict[str, Any]:
    """Return the JSON object that a file holds. `advice` ends every error message and says what to do.

    Raises:
        UserError: the file is missing, cannot be read, or does not hold a JSON object.
    """
    try:
        value = parse(file.read_bytes())
    except FileNotFoundError:
        raise UserError(f"{file}: not found{_sentence(advice)}") from None
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error.strerror}){_sentence(advice)}") from None
    except MalformedJSON as error:
        raise UserError(f"{file}: not valid JSON ({error}){_sentence(advice)}") from None
    if not isinstance(value, dict):
        raise UserError(f"{file}: expected a JSON object, found {_kind(value)}{_sentence(advice)}")
    return value


def read_lines(file: Path, advice: str, *, torn_end: bool = False) -> Iterator[tuple[dict[str, Any], str]]:
    """Yield (object, "file:line") for every line of a JSON Lines file that is not blank.

    `advice` ends every error message. `torn_end`: leave out a last line without its newline that is not JSON: a process
    is writing it, or was killed while it did.

    Raises:
        UserError: the file is missing or cannot be read, or a line does not hold a JSON object.
    """
    try:
        with file.open("rb") as lines:
            for number, line in enumerate(lines, start=1):
                where = f"{file}:{number}"
                if not line.strip():
                    continue
                try:
                    value = parse(line)
                except MalformedJSON as error:
                    if torn_end and not line.endswith(b"\n"):
                        return
                    raise UserError(f"{where}: not valid JSON ({error}){_sentence(advice)}") from None
                if not isinstance(value, dict):
                    raise UserError(f"{where}: expected a JSON object, found {_kind(value)}{_sentence(advice)}")
                yield value, where
    except FileNotFoundError:
        raise UserError(f"{file}: not found{_sentence(advice)}") from None
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error.strerror}){_sentence(advice)}") from None


def _sentence(advice: str) -> str:
    return f". {advice}" if advice else ""


def _kind(value: Any) -> str:
    """Name a JSON value's type as the JSON standard does."""
    names = {list: "an array", str: "a string", bool: "a boolean", type(None): "null"}
    return names.get(type(value), "a number")
