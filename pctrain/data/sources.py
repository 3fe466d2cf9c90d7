"""Records from files: what a path names, the records in it, and the parts that worker processes read by themselves.

files_of("data/*.jsonl")            -> the files
chunks(file)                        -> parts of a file: picklable, bounded
read_chunk(chunk, fields, need)     -> its records, and the faults of those that cannot be used, in order
iter_records, read_records          -> the same over all files of a path
iter_raw(path)                      -> the objects as they are, for what copies or edits a data set (`writing.write_records`)
"""

from __future__ import annotations

import glob
import hashlib
import json
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pctrain.common.errors import UserError
from pctrain.config.tree import FieldsConfig
from pctrain.data.columns import Columns, Form, choose, form_of
from pctrain.data.lines import ArchivePart, ByteRange, archive_pieces, plain_pieces
from pctrain.data.records import NEEDS, Fault, Record, Unreadable, make_record
from pctrain.data.tables import (
    GroupPart,
    RowGroups,
    StreamRows,
    data_set_files,
    data_set_pieces,
    is_data_set,
    parquet_pieces,
)
from pctrain.files.durable import fingerprint

CHUNK_BYTES = 8 << 20  # of text: what a worker process has in hand at once, a second's work
# Suffix, and the compression where there is one.
LINES = {
    ".jsonl": None,
    ".json": None,
    ".jsonl.gz": "gzip",
    ".json.gz": "gzip",
    ".jsonl.zst": "zstd",
    ".json.zst": "zstd",
}
FORMATS = ".jsonl (also .gz, .zst), .parquet, or a folder written by datasets' save_to_disk"
Piece = ByteRange | ArchivePart | RowGroups | GroupPart | StreamRows


@dataclass(frozen=True)
class Chunk:
    """A part of a file: where it lies, not what is in it. A process that reads parts in their order reads archives and large row groups
    once; one that goes back in them begins anew.

    `form` is what the file's first record has the columns of; `done` are the bytes of the file (on the disk) up to its end.
    """

    file: Path
    form: Form
    piece: Piece
    done: int


def files_of(path: Path | str) -> list[Path]:
    """The files that a path names: itself, what a glob matches (sorted), or the folder of a Hugging Face data set.

    Raises:
        UserError: there is none, or one of a format that is not read.
    """
    path = Path(path)
    try:
        there = path.exists()
    except OSError as error:
        raise UserError(f"data file {str(path)[:200]} cannot be read: {error.strerror}") from None
    if there:  # a name with brackets that is there is a name, not a pattern
        found = [path]
    elif not glob.has_magic(str(path)):
        raise UserError(f"data file {path} does not exist")
    else:
        found = [Path(name) for name in sorted(glob.glob(str(path), recursive=True))]
        # A pattern matches folders by the way, and the files inside a data set, which is read as one.
        found = [
            file for file in found if (file.is_file() or is_data_set(file)) and not any(map(is_data_set, file.parents))
        ]
        if not found:
            hint = " ([ and ] stand for one character of those between them)" if "[" in str(path) else ""
            raise UserError(f"{path}: no file matches this pattern{hint}")
    for file in found:
        parts_of(file)
    return found


def parts_of(file: Path) -> list[Path]:
    """The files on the disk that one of `files_of` consists of: itself, or the Arrow files of a data set's folder.

    Raises:
        UserError: its format is not read.
    """
    if file.is_dir():
        return data_set_files(file)
    if file.suffix != ".parquet" and _lines_suffix(file) is None:
        raise UserError(f"{file}: expected {FORMATS}")
    return [file]


def content_hash(path: Path | str) -> str:
    """sha256, in hex, of what a path names: of a file its bytes; of a glob or a folder the names and the bytes of all files.

    Raises:
        UserError: it cannot be read.
    """
    path = Path(path)
    if path.is_file() or not (path.is_dir() or glob.has_magic(str(path))):
        return fingerprint(path)
    digests = [[file.name, *map(fingerprint, parts_of(file))] for file in files_of(path)]
    return hashlib.sha256(json.dumps(digests).encode()).hexdigest()


def iter_records(path: Path | str, fields: FieldsConfig, need: Collection[str]) -> Iterator[Record | Fault]:
    """All records of a path, in the order of its files; in place of one that cannot be used its fault."""
    for file in files_of(path):
        for chunk in chunks(file):
            yield from read_chunk(chunk, fields, need)


def read_records(path: Path | str, fields: FieldsConfig, need: Collection[str]) -> list[Record]:
    """All records of a path, in memory.

    Args:
        path: file, glob or folder of a Hugging Face data set.
        fields: names the columns.
        need: what every record must have beside the prompt: "response", "answer" or both.
    Raises:
        UserError: a record that cannot be used (with file and line or row), a file that cannot be read, no record at all.
    """
    records = []
    for record in iter_records(path, fields, need):
        if isinstance(record, Fault):
            raise UserError(str(record))
        records.append(record)
    if not records:
        raise UserError(f"{path}: the data set is empty; expected one record a line or row")
    return records


def iter_raw(path: Path | str) -> Iterator[tuple[str, dict[str, Any]]]:
    """("<path>:<line or row>", object with all its columns) of every record of a path.

    Raises:
        UserError: a line that is no object.
    """
    for file in files_of(path):
        for piece, _ in _pieces(file, CHUNK_BYTES):
            for number, value in piece.values():
                if isinstance(value, Unreadable):
                    raise UserError(f"{file}:{number}: {value}")
                yield f"{file}:{number}", value


def chunks(file: Path, size: int = CHUNK_BYTES) -> Iterator[Chunk]:
    """The parts of one file of `files_of`, of about `size` bytes, in order. The same bytes give the same parts.

    Raises:
        UserError: the file cannot be read, or not to its end.
    """
    form = None
    for piece, done in _pieces(file, size):
        if form is None:
            form = next((form_of(value) for _, value in piece.values() if isinstance(value, dict)), "plain")
        yield Chunk(file, form, piece, done)


def _pieces(file: Path, size: int) -> Iterator[tuple[Piece, int]]:
    if file.is_dir():
        return data_set_pieces(file, size)
    if file.suffix == ".parquet":
        return parquet_pieces(file, size)
    compression = LINES[_lines_suffix(file)]
    return plain_pieces(file, size) if compression is None else archive_pieces(file, size, compression)


def _lines_suffix(file: Path) -> str | None:
    return next((suffix for suffix in LINES if file.name.endswith(suffix)), None)


def columns_of(chunk: Chunk, fields: FieldsConfig) -> Columns:
    """The columns that `read_chunk` reads it by; the same for every chunk of a file."""
    return choose(fields, chunk.form)


def read_chunk(chunk: Chunk, fields: FieldsConfig, need: Collection[str]) -> Iterator[Record | Fault]:
    """The records of a chunk; in place of one that cannot be used its fault."""
    return (record for _, record in read_numbered(chunk, fields, need))


def read_numbered(chunk: Chunk, fields: FieldsConfig, need: Collection[str]) -> Iterator[tuple[int, Record | Fault]]:
    """`read_chunk` with the line or row of each."""
    if not NEEDS.issuperset(need):
        raise ValueError(f"need: expected some of {sorted(NEEDS)}, got {need!r}")
    columns = columns_of(chunk, fields)
    for number, value in chunk.piece.values(columns.paths):
        try:
            yield number, make_record(_object(value), f"{chunk.file.name}:{number}", columns, need)
        except Unreadable as error:
            yield number, Fault(f"{chunk.file}:{number}", error.cause, str(error))


def _object(value: dict[str, Any] | Unreadable) -> dict[str, Any]:
    if isinstance(value, Unreadable):
        raise value
    return value
