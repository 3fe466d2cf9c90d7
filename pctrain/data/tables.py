"""Tables: parquet files, and folders written by `save_to_disk` of Hugging Face's `datasets`. Rows are counted from 0, as pandas does.

Both are read through pyarrow, a batch at a time and without its threads, which do not outlive a fork. A data set on disk is Arrow streams
whose order state.json gives; importing `datasets` for them would cost every worker process most of a second.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pctrain.common.errors import UserError
from pctrain.data.records import Unreadable

PIECE_ROWS = 4096
# A row group of up to this many pieces is one: it can only be decoded from its beginning.
PIECES_IN_A_GROUP = 8
READ_BYTES = (
    1 << 20
)  # of a column at once; without a bound pyarrow reads a whole row group, which may be the whole file
BATCH_BYTES = 1 << 20  # of text turned into Python objects at once
_NAME = re.compile(r"(?!\.+$)[^/\0\ud800-\udfff]{1,255}")  # of a file in the same folder


@dataclass(frozen=True)
class RowGroups:
    """Whole row groups `groups` of a parquet file; `first` is the number of their first row."""

    file: Path
    first: int
    groups: range
    batch_rows: int

    def values(self, paths: Collection[str] | None = None) -> Iterator[tuple[int, dict[str, Any] | Unreadable]]:
        with _named(self.file), _open_parquet(self.file) as table:
            names = table.schema_arrow.names
            _refuse_twice(names)
            batches = table.iter_batches(self.batch_rows, list(self.groups), _wanted(names, paths), use_threads=False)
            yield from _rows(batches, names, self.first)


@dataclass(frozen=True)
class GroupPart:
    """`rows` rows of row group `group`, from its row `start`; `first` is the number of the first one in the file."""

    file: Path
    first: int
    group: int
    start: int
    rows: int
    batch_rows: int

    def values(self, paths: Collection[str] | None = None) -> Iterator[tuple[int, dict[str, Any] | Unreadable]]:
        names, batches = _rows_of_group(self, paths)
        yield from _rows(batches, names, self.first)


@dataclass(frozen=True)
class StreamRows:
    """`rows` rows of an Arrow stream file, from its row `start`; `first` is the number of the first one in the whole data set."""

    file: Path
    first: int
    start: int
    rows: int
    batch_rows: int

    def values(self, paths: Collection[str] | None = None) -> Iterator[tuple[int, dict[str, Any] | Unreadable]]:
        with _named(self.file), pa.memory_map(str(self.file)) as stream, pa.ipc.open_stream(stream) as reader:
            names = reader.schema.names
            _refuse_twice(names)
            wanted = _wanted(names, paths)
            batches = (batch if wanted is None else batch.select(wanted) for batch in self._slices(reader))
            yield from _rows(batches, names, self.first)

    def _slices(self, reader: pa.RecordBatchReader) -> Iterator[pa.RecordBatch]:
        """The rows in slices of `batch_rows`. Passing over a batch of a mapped file reads its header alone."""
        stop, position = self.start + self.rows, 0
        for batch in reader:
            begin, end = max(self.start - position, 0), min(stop - position, batch.num_rows)
            for at in range(begin, end, self.batch_rows):
                yield batch.slice(at, min(self.batch_rows, end - at))
            position += batch.num_rows
            if position >= stop:
                return


# ---------------------------------------------------------------- parquet


def parquet_pieces(file: Path, size: int) -> Iterator[tuple[RowGroups | GroupPart, int]]:
    """The pieces of a parquet file with about `size` bytes each (as encoded), and the bytes of the file up to the end of each."""
    with _named(file), _open_parquet(file) as table:
        metadata, bytes_on_disk = table.metadata, file.stat().st_size
        first, group = 0, 0

        def done(rows: int) -> int:
            return bytes_on_disk * rows // max(1, metadata.num_rows)

        while group < metadata.num_row_groups:
            groups, rows, encoded = _next_groups(metadata, group, size)
            average = max(1, encoded // max(1, rows))
            if encoded > PIECES_IN_A_GROUP * size:
                step = _between(size // average, 1, PIECE_ROWS)
                for start in range(0, rows, step):
                    taken = min(step, rows - start)
                    yield (
                        GroupPart(file, first + start, group, start, taken, _batch_rows(average)),
                        done(first + start + taken),
                    )
            else:
                yield RowGroups(file, first, groups, _batch_rows(average)), done(first + rows)
            first, group = first + rows, groups.stop


def _next_groups(metadata: pq.FileMetaData, start: int, size: int) -> tuple[range, int, int]:
    """As many row groups from `start` on as fit into a piece, at least one; their rows and encoded bytes."""
    stop, rows, encoded = start, 0, 0
    while stop < metadata.num_row_groups:
        more = metadata.row_group(stop)
        if stop > start and (encoded + more.total_byte_size > size or rows + more.num_rows > PIECE_ROWS):
            break
        stop, rows, encoded = stop + 1, rows + more.num_rows, encoded + more.total_byte_size
    return range(start, stop), rows, encoded


def _open_parquet(file: Path) -> pq.ParquetFile:
    return pq.ParquetFile(file, buffer_size=READ_BYTES, pre_buffer=False)


class _Group:
    """A row group that is read forwards."""

    def __init__(self, part: GroupPart, paths: Collection[str] | None):
        self.version = _version(part, paths)
        self.position = 0
        table = _open_parquet(part.file)
        self.names = table.schema_arrow.names
        _refuse_twice(self.names)
        self._batches = table.iter_batches(part.batch_rows, [part.group], _wanted(self.names, paths), use_threads=False)
        self._rest: pa.RecordBatch | None = None

    def read(self, rows: int) -> list[pa.RecordBatch]:
        """The next rows. pyarrow's batches may be shorter than what it was asked for."""
        self.position += rows
        taken = []
        while rows:
            batch = self._rest or next(self._batches)
            taken.append(batch.slice(0, rows))
            self._rest = batch.slice(rows) if batch.num_rows > rows else None
            rows -= taken[-1].num_rows
        return taken


_last: _Group | None = None  # the large row group that this process read a part of last


def _rows_of_group(part: GroupPart, paths: Collection[str] | None) -> tuple[list[str], list[pa.RecordBatch]]:
    """The names of all columns, and the rows. A process that reads part after part goes on where it was."""
    global _last
    here = _last
    with _named(part.file):
        if here is None or here.version != _version(part, paths) or here.position > part.start:
            here = _Group(part, paths)
        _last = None  # a reader that failed is not read again
        while here.position < part.start:
            here.read(min(part.batch_rows, part.start - here.position))
        batches = here.read(part.rows)
    _last = here
    return here.names, batches


def _version(part: GroupPart, paths: Collection[str] | None) -> tuple:
    state = part.file.stat()
    return (
        str(part.file),
        state.st_size,
        state.st_mtime_ns,
        part.group,
        part.batch_rows,
        None if paths is None else tuple(paths),
    )


# ---------------------------------------------------------------- data sets on disk


def is_data_set(folder: Path) -> bool:
    """Whether `save_to_disk` of a Dataset or a DatasetDict wrote this folder."""
    return any((folder / name).is_file() for name in ("state.json", "dataset_dict.json"))


def data_set_files(folder: Path) -> list[Path]:
    """The Arrow files of a data set on disk, in their order.

    Raises:
        UserError: it is a DatasetDict, no data set, or a file of it is missing.
    """
    if (folder / "dataset_dict.json").is_file():
        splits = _names(
            _read_json(folder / "dataset_dict.json").get("splits", []), folder / "dataset_dict.json", "splits"
        )
        raise UserError(
            f"{folder} holds several splits; name one of them: {', '.join(str(folder / split) for split in splits)}"
        )
    if not is_data_set(folder):
        raise UserError(
            f"{folder} is a folder, but no data set that datasets' save_to_disk wrote (there is no state.json in it); "
            f"for the files in it give a pattern, such as {folder / '*.jsonl'}"
        )
    entries = _read_json(folder / "state.json").get("_data_files", [])
    names = (
        [entry.get("filename") if isinstance(entry, dict) else None for entry in entries]
        if isinstance(entries, list)
        else entries
    )
    files = [folder / name for name in _names(names, folder / "state.json", "_data_files")]
    for file in files:
        if not file.is_file():
            raise UserError(f"{file} does not exist, but {folder / 'state.json'} names it; copy the data set again")
    return files


def data_set_pieces(folder: Path, size: int) -> Iterator[tuple[StreamRows, int]]:
    """The pieces of a data set on disk with about `size` bytes each, and the bytes of it up to the end of each."""
    first, before = 0, 0
    for file in data_set_files(folder):
        with _named(file), pa.memory_map(str(file)) as stream, pa.ipc.open_stream(stream) as reader:
            start, rows, held, average = 0, 0, 0, 1
            for batch in reader:
                average = max(1, batch.nbytes // max(1, batch.num_rows))
                left = batch.num_rows
                while left:
                    taken = min(left, max(1, (size - held) // average), PIECE_ROWS - rows)
                    rows, held, left = rows + taken, held + taken * average, left - taken
                    if held + average > size or rows == PIECE_ROWS:
                        yield StreamRows(file, first, start, rows, _batch_rows(average)), before + stream.tell()
                        first, start, rows, held = first + rows, start + rows, 0, 0
            before += file.stat().st_size
            if rows:
                yield StreamRows(file, first, start, rows, _batch_rows(average)), before
                first += rows


def _names(names: Any, file: Path, key: str) -> list[str]:
    """Of files beside `file`: nothing else is read because a data set says so."""
    if not isinstance(names, list) or not all(isinstance(name, str) and _NAME.fullmatch(name) for name in names):
        raise UserError(
            f"{file}: expected under {key!r} the names of files or folders beside it; copy the data set again"
        )
    return names


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {error}") from None
    if not isinstance(value, dict):
        raise UserError(f"{path}: expected a JSON object")
    return value


# ---------------------------------------------------------------- rows as objects


def _wanted(names: list[str], paths: Collection[str] | None) -> list[str] | None:
    """The top-level columns that the dotted paths lead into; None: all."""
    return (
        None
        if paths is None
        else [name for name in names if any(path == name or path.split(".")[0] == name for path in paths)]
    )


def _refuse_twice(names: list[str]) -> None:
    """pa.ArrowException, as for everything else that is wrong with a file: an object has one value of each name."""
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise pa.ArrowInvalid(f"two of its columns have the name {twice!r}")


def _rows(
    batches: Iterator[pa.RecordBatch], names: list[str], first: int
) -> Iterator[tuple[int, dict[str, Any] | Unreadable]]:
    """Every row as an object. Columns that were not read are None in it: a message names them, nobody looks at their content."""
    blank = dict.fromkeys(names)
    for batch in batches:
        for number, row in enumerate(_objects(batch), start=first):
            yield number, row if isinstance(row, Unreadable) else {**blank, **row}
        first += batch.num_rows


def _objects(batch: pa.RecordBatch) -> list[dict[str, Any] | Unreadable]:
    try:
        return batch.to_pylist()
    except UnicodeDecodeError as error:  # pyarrow does not look at the bytes of a string before somebody asks for them
        fault = Unreadable("not_utf8", f"not UTF-8 at byte {error.start + 1} of a text; write the column as UTF-8")
    except (OverflowError, ValueError) as error:  # such as a date beyond the year 9999
        fault = Unreadable(
            "wrong_type", f"a column holds a value that cannot be read ({error}); mend it, or leave the column out"
        )
    return (
        [fault]
        if batch.num_rows == 1
        else [row for at in range(batch.num_rows) for row in _objects(batch.slice(at, 1))]
    )


def _batch_rows(average: int) -> int:
    return _between(BATCH_BYTES // average, 1, PIECE_ROWS)


def _between(value: int, low: int, high: int) -> int:
    return min(max(value, low), high)


@contextmanager
def _named(file: Path) -> Iterator[None]:
    try:
        yield
    except (
        pa.ArrowException,
        OSError,
        UnicodeDecodeError,
    ) as error:  # the last: a name in the file's own table of contents
        kind = "parquet file" if file.suffix == ".parquet" else "Arrow file"
        raise UserError(
            f"{kind} {file} cannot be read: {str(error).strip()}; it may be cut off or of another format"
        ) from None
