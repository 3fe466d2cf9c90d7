"""JSON lines: one object a line, UTF-8, in pieces that are cut at line ends."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from pctrain.data.columns import kind
from pctrain.data.records import Unreadable
from pctrain.errors import UserError

BYTE_ORDER_MARK = b"\xef\xbb\xbf"


@dataclass(frozen=True)
class ByteRange:
    """Bytes `start` to `stop` of a file; line `first` (from 1) begins at `start`."""

    file: Path
    first: int
    start: int
    stop: int

    def values(self, _: Collection[str] | None = None) -> Iterator[tuple[int, dict[str, Any] | Unreadable]]:
        """Number and object of every line that is not blank. A line has to be parsed whole, whichever columns are asked for."""
        with open_file(self.file) as stream:
            stream.seek(self.start)
            yield from parse_lines(stream.read(self.stop - self.start), self.first)


def byte_ranges(file: Path, size: int) -> Iterator[ByteRange]:
    """The pieces of a plain file, each of `size` bytes and what is left of its last line."""
    with open_file(file) as stream:
        start, first = 0, 1
        for block in blocks(stream, size):
            yield ByteRange(file, first, start, start + len(block))
            start, first = start + len(block), first + block.count(b"\n")


def blocks(stream: IO[bytes], size: int) -> Iterator[bytes]:
    while block := stream.read(size):
        yield block + stream.readline()


def parse_lines(data: bytes, first: int) -> Iterator[tuple[int, dict[str, Any] | Unreadable]]:
    if first == 1:
        data = data.removeprefix(BYTE_ORDER_MARK)
    # bytes.splitlines and str.splitlines would cut at characters that may stand inside a JSON string.
    for number, line in enumerate(data.split(b"\n"), start=first):
        if line.strip():
            yield number, _parse(line)


def _parse(line: bytes) -> dict[str, Any] | Unreadable:
    try:
        value = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        return Unreadable("not_utf8", f"not UTF-8 at byte {error.start + 1} of the line; save the file as UTF-8")
    except json.JSONDecodeError as error:
        return Unreadable("malformed_json", f"malformed JSON at column {error.colno}: {error.msg}")
    except (RecursionError, ValueError) as error:  # nested too deep; an integer of thousands of digits
        return Unreadable("malformed_json", f"malformed JSON: {error}")
    if not isinstance(value, dict):
        return Unreadable("not_an_object", f"expected a JSON object, got {kind(value)}; a line is one record")
    return value


def open_file(file: Path) -> IO[bytes]:
    try:
        return open(file, "rb")
    except OSError as error:
        raise UserError(f"data file {file} cannot be read: {error.strerror}") from None
