"""JSON lines, plain or compressed: one object a line, UTF-8, in pieces that are cut at line ends. Lines are counted from 1."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import pyarrow as pa

from pctrain.data.columns import kind
from pctrain.data.records import Unreadable
from pctrain.errors import UserError

BYTE_ORDER_MARK = b"\xef\xbb\xbf"
READ_BYTES = 256 << 10  # of an archive's text at once: what is lost before the damage in it is told


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


@dataclass(frozen=True)
class HeldLines:
    """Whole lines of an archive, unpacked; the first of them is line `first`."""

    first: int
    data: bytes

    def values(self, _: Collection[str] | None = None) -> Iterator[tuple[int, dict[str, Any] | Unreadable]]:
        return parse_lines(self.data, self.first)


def plain_pieces(file: Path, size: int) -> Iterator[tuple[ByteRange, int]]:
    """The pieces of a plain file, each of `size` bytes and what is left of its last line; and the bytes up to the end of each."""
    with open_file(file) as stream:
        start, first = 0, 1
        while block := stream.read(size):
            block += stream.readline()
            yield ByteRange(file, first, start, start + len(block)), start + len(block)
            start, first = start + len(block), first + block.count(b"\n")


def archive_pieces(file: Path, size: int, compression: str) -> Iterator[tuple[HeldLines, int]]:
    """The pieces of a compressed file, each of at least `size` bytes unpacked, and the bytes of the archive up to the end of each.

    pyarrow's streams tell an archive that was cut off from one that ends, for both compressions; zstandard's readers do not.

    Args:
        compression: as pyarrow names it, gzip or zstd.
    """
    held, first = bytearray(), 1
    with open_file(file) as packed, pa.CompressedInputStream(packed, compression) as stream:
        while True:
            try:
                part = stream.read(min(size, READ_BYTES))
            except OSError as error:
                lines = first - 1 + held.count(b"\n")
                raise UserError(f"{file}: the {compression} archive is cut off or damaged after line {lines} or a little later ({error}); "
                                "make or copy it again") from None
            held += part
            if len(held) >= size or not part:
                stop = held.rfind(b"\n") + 1 if part else len(held)
                if stop:
                    yield HeldLines(first, bytes(held[:stop])), packed.tell()
                first += held.count(b"\n", 0, stop)
                del held[:stop]
            if not part:
                return


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
