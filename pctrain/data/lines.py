"""JSON lines, plain or compressed: one UTF-8 object per line. Lines are counted from 1; pieces are cut at line ends."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import pyarrow as pa

from pctrain.common.errors import UserError
from pctrain.data.columns import json_kind
from pctrain.data.records import Unreadable

BYTE_ORDER_MARK = b"\xef\xbb\xbf"
# Unpacked bytes to read from an archive at once. If the archive is damaged, at most this much good text before the
# damage is lost.
READ_BYTES = 256 << 10


@dataclass(frozen=True)
class ByteRange:
    """Bytes `start` to `stop` of a file. Line `first` (counted from 1) begins at `start`."""

    file: Path
    first: int
    start: int
    stop: int

    def values(self, _: Collection[str] | None = None) -> Iterator[tuple[int, dict[str, Any] | Unreadable]]:
        """Yield the number and the object of every line that is not blank.

        The wanted columns are ignored: a line has to be parsed whole anyway.
        """
        with open_file(self.file) as stream:
            stream.seek(self.start)
            yield from parse_lines(stream.read(self.stop - self.start), self.first)


@dataclass(frozen=True)
class ArchivePart:
    """Bytes `start` to `stop` of the text that an archive unpacks to.

    Line `first` (counted from 1) begins at `start`.
    """

    file: Path
    compression: str
    first: int
    start: int
    stop: int

    def values(self, _: Collection[str] | None = None) -> Iterator[tuple[int, dict[str, Any] | Unreadable]]:
        """Yield the number and the object of every line that is not blank."""
        yield from parse_lines(_unpack(self), self.first)


def plain_pieces(file: Path, size: int) -> Iterator[tuple[ByteRange, int]]:
    """Yield the pieces of a plain file, and the bytes of the file up to the end of each.

    Each piece has `size` bytes plus the rest of its last line.
    """
    with open_file(file) as stream:
        start, first = 0, 1
        while block := stream.read(size):
            block += stream.readline()
            yield ByteRange(file, first, start, start + len(block)), start + len(block)
            start, first = start + len(block), first + block.count(b"\n")


def archive_pieces(file: Path, size: int, compression: str) -> Iterator[tuple[ArchivePart, int]]:
    """Yield the pieces of a compressed file, and the bytes of the archive up to the end of each.

    Each piece has at least `size` bytes when unpacked. `compression` is pyarrow's name: gzip or zstd.

    Raises:
        UserError: the archive is damaged or cut off.
    """
    unpacked = _Unpacked(file, compression)
    held = bytearray()
    start, first = 0, 1
    while True:
        try:
            block = unpacked.read(min(size, READ_BYTES))
        except OSError as error:
            raise _damaged(file, compression, first - 1 + held.count(b"\n"), error) from None
        held += block
        if len(held) >= size or not block:
            length = held.rfind(b"\n") + 1 if block else len(held)
            if length:
                yield ArchivePart(file, compression, first, start, start + length), unpacked.packed_position
            start, first = start + length, first + held.count(b"\n", 0, length)
            del held[:length]
        if not block:
            return


class _Unpacked:
    """The text of an archive, read forwards.

    It uses pyarrow's streams because they distinguish a truncated archive from a complete one for both compressions.
    The readers of zstandard do not.
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
        block = self._stream.read(size)
        self.position += len(block)
        return block


_last: _Unpacked | None = None  # the archive that this process read last


def _unpack(part: ArchivePart) -> bytes:
    """Return the text of a part.

    An archive can only be read from its beginning. A process that reads part after part continues from where it
    stopped.
    """
    global _last
    archive = _last
    if archive is None or archive.version != _version(part.file) or archive.position > part.start:
        archive = _Unpacked(part.file, part.compression)
    _last = None  # a stream that failed is not read again
    try:
        while archive.position < part.start:
            if not archive.read(min(READ_BYTES, part.start - archive.position)):
                break
        text = archive.read(part.stop - part.start)
    except OSError as error:
        raise _damaged(part.file, part.compression, part.first - 1, error) from None
    _last = archive
    return text


def _version(file: Path) -> tuple[str, int, int]:
    state = file.stat()
    return str(file), state.st_size, state.st_mtime_ns


def _damaged(file: Path, compression: str, lines: int, error: OSError) -> UserError:
    return UserError(
        f"{file}: the {compression} archive is cut off or damaged after line {lines} or a little later ({error}). "
        "Make or copy it again."
    )


def parse_lines(data: bytes, first: int) -> Iterator[tuple[int, dict[str, Any] | Unreadable]]:
    """Yield the number and the object of every line that is not blank. The first line has the number `first`."""
    if first == 1:
        data = data.removeprefix(BYTE_ORDER_MARK)
    # str.splitlines would cut at characters that are valid inside a JSON string; bytes.splitlines at a lone \r between
    # tokens.
    for number, line in enumerate(data.split(b"\n"), start=first):
        if line.strip():
            yield number, _parse(line)


def _parse(line: bytes) -> dict[str, Any] | Unreadable:
    try:
        value = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        return Unreadable("not_utf8", f"not UTF-8 at byte {error.start + 1} of the line")
    except json.JSONDecodeError as error:
        return Unreadable("malformed_json", f"malformed JSON at column {error.colno}: {error.msg}")
    except (RecursionError, ValueError) as error:  # nested too deep; an integer of thousands of digits
        return Unreadable("malformed_json", f"malformed JSON: {error}")
    if not isinstance(value, dict):
        return Unreadable("not_an_object", f"expected a JSON object, got {json_kind(value)}")
    return value


def open_file(file: Path) -> IO[bytes]:
    """Open a data file for reading.

    Raises:
        UserError: the file cannot be read.
    """
    try:
        return open(file, "rb")
    except OSError as error:
        raise UserError(f"data file {file} cannot be read: {error.strerror}") from None
