"""Records from files: the files that a path names, their records, and the chunks that worker processes read.

list_files("data/*.jsonl")          -> the files
split_file(file)                    -> chunks of a file: picklable and bounded
read_chunk(chunk, fields, need)     -> the records of a chunk in order, with a fault in place of each that cannot be
used iter_records, read_records          -> the same over all files of a path
iter_raw(path)                      -> the objects unchanged, to copy or edit a data set (`writing.write_records`)
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
from pctrain.data.columns import Columns, Form, choose_columns, detect_form
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

CHUNK_BYTES = 8 << 20  # text that a worker process holds at once: about a second's work
# The compression of each suffix.
LINES: dict[str, str | None] = {
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
    """The position of a part of a file, without its content.

    A process that reads chunks in order reads archives and large row groups once. Reading an earlier chunk starts over.
    `form` is the form of the file's first record. `done` is the number of bytes of the file on disk up to the end of
    the chunk.
    """

    file: Path
    form: Form
    piece: Piece
    done: int


def list_files(path: Path | str) -> list[Path]:
    """Return the files that a path names: the path itself, a glob's matches (sorted), or the folder of a data set.

    Raises:
        UserError: there is no such file, or its format is not supported.
    """
    path = Path(path)
    try:
        exists = path.exists()
    except OSError as error:
        raise UserError(f"data file {str(path)[:200]} cannot be read: {error.strerror}") from None
    if exists:  # a file whose name has brackets is a file, not a pattern
        files = [path]
    elif not glob.has_magic(str(path)):
        raise UserError(f"data file {path} does not exist")
    else:
        files = _match_pattern(path)
    for file in files:
        list_disk_files(file)  # raises for an unsupported format
    return files


def _match_pattern(pattern: Path) -> list[Path]:
    """Return the files and data sets that a glob matches, but not other folders or the files inside a data set."""
    files = []
    for name in sorted(glob.glob(str(pattern), recursive=True)):
        file = Path(name)
        if (file.is_file() or is_data_set(file)) and not any(map(is_data_set, file.parents)):
            files.append(file)
    if not files:
        hint = " ([...] matches one character of those in the brackets)" if "[" in str(pattern) else ""
        raise UserError(f"{pattern}: no file matches this pattern{hint}")
    return files


def list_disk_files(file: Path) -> list[Path]:
    """Return the files on disk behind one result of `list_files`: itself, or the Arrow files in a data set's folder.

    Raises:
        UserError: the format is not supported.
    """
    if file.is_dir():
        return data_set_files(file)
    if file.suffix != ".parquet" and _lines_suffix(file) is None:
        raise UserError(f"{file}: expected {FORMATS}")
    return [file]


def content_hash(path: Path | str) -> str:
    """Return the sha256, in hex, of a file's bytes; for a glob or a folder, of the names and the bytes of all files.

    Raises:
        UserError: a file cannot be read.
    """
    path = Path(path)
    if path.is_file() or not (path.is_dir() or glob.has_magic(str(path))):
        return fingerprint(path)
    digests = [[file.name, *map(fingerprint, list_disk_files(file))] for file in list_files(path)]
    return hashlib.sha256(json.dumps(digests).encode()).hexdigest()


def iter_records(path: Path | str, fields: FieldsConfig, need: Collection[str]) -> Iterator[Record | Fault]:
    """Yield all records of a path, in the order of its files, with a fault in place of each that cannot be used."""
    for file in list_files(path):
        for chunk in split_file(file):
            yield from read_chunk(chunk, fields, need)


def read_records(path: Path | str, fields: FieldsConfig, need: Collection[str]) -> list[Record]:
    """Return all records of a path.

    Args:
        path: file, glob, or folder of a Hugging Face data set.
        fields: names the columns.
        need: the fields that every record must have in addition to the prompt: "response", "answer" or both.

    Raises:
        UserError: a record cannot be used (the message names file and line or row), a file cannot be read, or there is
            no record.
    """
    records = []
    for record in iter_records(path, fields, need):
        if isinstance(record, Fault):
            raise UserError(str(record))
        records.append(record)
    if not records:
        raise UserError(f"{path}: the data set is empty; expected one record per line or row")
    return records


def iter_raw(path: Path | str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield ("<path>:<line or row>", object with all its columns) for every record of a path.

    Raises:
        UserError: a line is not an object.
    """
    for file in list_files(path):
        for piece, _ in _pieces(file, CHUNK_BYTES):
            for number, value in piece.values():
                where = f"{file}:{number}"
                if isinstance(value, Unreadable):
                    raise UserError(str(Fault(where, value.cause, str(value))))
                yield where, value


def split_file(file: Path, size: int = CHUNK_BYTES) -> Iterator[Chunk]:
    """Yield the chunks of one result of `list_files`, of about `size` bytes, in order.

    The same bytes give the same chunks.

    Raises:
        UserError: the file cannot be read to its end.
    """
    form: Form | None = None
    for piece, done in _pieces(file, size):
        if form is None:
            form = _detect_first_form(piece)
        yield Chunk(file, form, piece, done)


def _detect_first_form(piece: Piece) -> Form:
    for _, value in piece.values():
        if isinstance(value, dict):
            return detect_form(value)
    return "plain"


def _pieces(file: Path, size: int) -> Iterator[tuple[Piece, int]]:
    if file.is_dir():
        return data_set_pieces(file, size)
    if file.suffix == ".parquet":
        return parquet_pieces(file, size)
    suffix = _lines_suffix(file)
    compression = None if suffix is None else LINES[suffix]
    return plain_pieces(file, size) if compression is None else archive_pieces(file, size, compression)


def _lines_suffix(file: Path) -> str | None:
    return next((suffix for suffix in LINES if file.name.endswith(suffix)), None)


def chunk_columns(chunk: Chunk, fields: FieldsConfig) -> Columns:
    """Return the columns by which a chunk is read. They are the same for every chunk of a file."""
    return choose_columns(fields, chunk.form)


def read_chunk(chunk: Chunk, fields: FieldsConfig, need: Collection[str]) -> Iterator[Record | Fault]:
    """Yield the records of a chunk, with a fault in place of each that cannot be used."""
    return (record for _, record in read_numbered(chunk, fields, need))


def read_numbered(chunk: Chunk, fields: FieldsConfig, need: Collection[str]) -> Iterator[tuple[int, Record | Fault]]:
    """Yield the line or row of each record of a chunk, and the record or its fault."""
    if not NEEDS.issuperset(need):
        raise ValueError(f"need: expected some of {sorted(NEEDS)}, got {need!r}")
    columns = chunk_columns(chunk, fields)
    for number, value in chunk.piece.values(columns.paths):
        try:
            yield number, make_record(_object(value), f"{chunk.file.name}:{number}", columns, need)
        except Unreadable as error:
            yield number, Fault(f"{chunk.file}:{number}", error.cause, str(error))


def _object(value: dict[str, Any] | Unreadable) -> dict[str, Any]:
    if isinstance(value, Unreadable):
        raise value
    return value
