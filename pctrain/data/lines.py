"""JSON lines, plain or compressed: one object a line, UTF-8, in pieces that are cut at line ends. Lines are counted from 1."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import pyarrow as pa

from pctrain.common.errors import UserError
from pctrain.data.columns import kind
from pctrain.data.records import Unreadable

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
class ArchivePart:
    """Bytes `start` to `stop` of what an archive unpacks to; line `first` (from 1) begins at `start`."""

    file: Path
    compression: str
    first: int
    start: int
    stop: int

    def values(self, _: Collection[str] | None = None) -> Iterator[tuple[int, dict[str, Any] | Unreadable]]:
        yield from parse_lines(_unpack(self), self.first)


def plain_pieces(file: Path, size: int) -> Iterator[tuple[ByteRange, int]]:
    """The pieces of a plain file, each of `size` bytes and what is left of its last line; and the bytes up to the end of each."""
    with open_file(file) as stream:
        start, first = 0, 1
        while block := stream.read(size):
            block += stream.readline()
            yield ByteRange(file, first, start, start + len(block)), start + len(block)
            start, first = start + len(block), first + block.count(b"\n")


def archive_pieces(file: Path, size: int, compression: str) -> Iterator[tuple[ArchivePart, int]]:
    """The pieces of a compressed file, each of at least `size` bytes unpacked, and the bytes of the archive up to the end of each.

    Args:
        compression: as pyarrow names it, gzip or zstd.
    Raises:
        UserError: the archive is damaged or cut off.
    """
    unpacked, held, start, first = _Unpacked(file, compression), bytearray(), 0, 1
    while True:
        try:
            part = unpacked.read(min(size, READ_BYTES))
        except OSError as error:
            raise _damaged(file, compression, first - 1 + held.count(b"\n"), error) from None
        held += part
        if len(held) >= size or not part:
            length = held.rfind(b"\n") + 1 if part else len(held)
            if length:
                yield ArchivePart(file, compression, first, start, start + length), unpacked.packed_position
            start, first = start + length, first + held.count(b"\n", 0, length)
            del held[:length]
        if not part:
            return


class _Unpacked:
    """The text of an archive, read forwards.

    By pyarrow's streams, which tell an archive that was cut off from one that ends, for both compressions; zstandard's readers do not.
    """

    def __init__(self, file: Path, compression: str):
        self.version = _version(file)
        self.position = 0
        self._packed = open_file(file)
        self._stream = pa.CompressedInputStream(self._packed, compression)

    @property
    def packed_position(self) -> int:
        return self._packed.tell()

    def read(self, size: int) -> bytes:
        part = self._stream.read(size)
        self.position += len(part)
        return part


_last: _Unpacked | None = None  # the archive that this process read a part of last


def _unpack(part: ArchivePart) -> bytes:
    """The text of a part. An archive can only be read from its beginning: a process that reads part after part goes on where it was."""
    global _last
    here = _last
    if here is None or here.version != _version(part.file) or here.position > part.start:
        here = _Unpacked(part.file, part.compression)
    _last = None  # a stream that failed is not read again
    try:
        while here.position < part.start and here.read(min(READ_BYTES, part.start - here.position)):
            pass
        text = here.read(part.stop - part.start)
    except OSError as error:
        raise _damaged(part.file, part.compression, part.first - 1, error) from None
    _last = here
    return text


def _version(file: Path) -> tuple[str, int, int]:
    state = file.stat()
    return str(file), state.st_size, state.st_mtime_ns


def _damaged(file: Path, compression: str, lines: int, error: OSError) -> UserError:
    return UserError(
        f"{file}: the {compression} archive is cut off or damaged after line {lines} or a little later ({error}); "
        "make or copy it again"
    )


def parse_lines(data: bytes, first: int) -> Iterator[tuple[int, dict[str, Any] | Unreadable]]:
    if first == 1:
        data = data.removeprefix(BYTE_ORDER_MARK)
    # str.splitlines would cut at characters that may stand inside a JSON string, bytes.splitlines at a lone \r between its tokens.
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
