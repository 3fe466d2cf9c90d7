"""Tables: parquet files, and folders that `save_to_disk` of Hugging Face's `datasets` wrote. Rows are counted from 0.

Both are read through pyarrow, a batch at a time and without its threads, which do not survive a fork. A data set on
disk consists of Arrow streams, and state.json gives their order. Importing `datasets` to read them would cost every
worker process most of a second.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pctrain.common.errors import UserError
from pctrain.data.records import Unreadable
from pctrain.files.json_file import read_object

PIECE_ROWS = 4096
# A row group of up to this many pieces is read as one piece, because it can only be decoded from its beginning.
PIECES_IN_A_GROUP = 8
# Bytes of a column to read at once. Without a bound pyarrow reads a whole row group, which may be the whole file.
READ_BYTES = 1 << 20
BATCH_BYTES = 1 << 20  # text to turn into Python objects at once
COPY_AGAIN = "Copy the data set again"
_NAME = re.compile(r"(?!\.+$)[^/\0\ud800-\udfff]{1,255}")  # a file in the same folder
Rows = Iterator[tuple[int, dict[str, Any] | Unreadable]]


@dataclass(frozen=True)
class RowGroups:
    """The whole row groups `groups` of a parquet file. `first` is the number of their first row."""

    file: Path
    first: int
    groups: range
    batch_rows: int

    def values(self, paths: Collection[str] | None = None) -> Rows:
        """Yield the number and the object of every row, with the columns that `paths` lead into; None reads all."""
        with _named_errors(self.file), _open_parquet(self.file) as table:
            names = table.schema_arrow.names
            _refuse_duplicates(names)
            wanted = _wanted_columns(names, paths)
            batches = table.iter_batches(self.batch_rows, list(self.groups), wanted, use_threads=False)
            yield from _number_rows(batches, names, self.first)


@dataclass(frozen=True)
class GroupPart:
    """`rows` rows of the row group `group`, from its row `start`.

    `first` is the number of the first of them in the file.
    """

    file: Path
    first: int
    group: int
    start: int
    rows: int
    batch_rows: int

    def values(self, paths: Collection[str] | None = None) -> Rows:
        """Yield the number and the object of every row, with the columns that `paths` lead into; None reads all."""
        names, batches = _read_group_part(self, paths)
        yield from _number_rows(batches, names, self.first)


@dataclass(frozen=True)
class StreamRows:
    """`rows` rows of an Arrow stream file, from its row `start`.

    `first` is the number of the first of them in the data set.
    """

    file: Path
    first: int
    start: int
    rows: int
    batch_rows: int

    def values(self, paths: Collection[str] | None = None) -> Rows:
        """Yield the number and the object of every row, with the columns that `paths` lead into; None reads all."""
        with _named_errors(self.file), pa.memory_map(str(self.file)) as stream, pa.ipc.open_stream(stream) as reader:
            names = reader.schema.names
            _refuse_duplicates(names)
            wanted = _wanted_columns(names, paths)
            batches = (batch if wanted is None else batch.select(wanted) for batch in self._slices(reader))
            yield from _number_rows(batches, names, self.first)

    def _slices(self, reader: pa.RecordBatchReader) -> Iterator[pa.RecordBatch]:
        """Yield the rows in slices of `batch_rows`. Skipping a batch of a mapped file reads only its header."""
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
    """Yield the pieces of a parquet file, of about `size` encoded bytes each, and the file's bytes up to each end."""
    with _named_errors(file), _open_parquet(file) as table:
        metadata, bytes_on_disk = table.metadata, file.stat().st_size
        first, group = 0, 0

        def bytes_up_to(row: int) -> int:
            return bytes_on_disk * row // max(1, metadata.num_rows)

        while group < metadata.num_row_groups:
            groups, rows, encoded = _next_groups(metadata, group, size)
            average = max(1, encoded // max(1, rows))
            batch_rows = _batch_rows(average)
            if encoded > PIECES_IN_A_GROUP * size:
                step = _clamp(size // average, 1, PIECE_ROWS)
                for start in range(0, rows, step):
                    taken = min(step, rows - start)
                    part = GroupPart(file, first + start, group, start, taken, batch_rows)
                    yield part, bytes_up_to(first + start + taken)
            else:
                yield RowGroups(file, first, groups, batch_rows), bytes_up_to(first + rows)
            first, group = first + rows, groups.stop


def _next_groups(metadata: pq.FileMetaData, start: int, size: int) -> tuple[range, int, int]:
    """Return the row groups from `start` that fit into one piece (at least one), their rows and their encoded bytes."""
    stop = start
    rows = 0
    encoded = 0
    while stop < metadata.num_row_groups:
        more = metadata.row_group(stop)
        if stop > start and (encoded + more.total_byte_size > size or rows + more.num_rows > PIECE_ROWS):
            break
        stop += 1
        rows += more.num_rows
        encoded += more.total_byte_size
    return range(start, stop), rows, encoded


def _open_parquet(file: Path) -> pq.ParquetFile:
    return pq.ParquetFile(file, buffer_size=READ_BYTES, pre_buffer=False)


class _Group:
    """The rows of one row group, read forwards."""

    def __init__(self, part: GroupPart, paths: Collection[str] | None):
        self.version = _version(part, paths)
        self.position = 0
        table = _open_parquet(part.file)
        self.names = table.schema_arrow.names
        _refuse_duplicates(self.names)
        wanted = _wanted_columns(self.names, paths)
        self._batches = table.iter_batches(part.batch_rows, [part.group], wanted, use_threads=False)
        self._rest: pa.RecordBatch | None = None

    def read(self, rows: int) -> list[pa.RecordBatch]:
        """Return the next rows. pyarrow's batches may be shorter than requested."""
        self.position += rows
        taken = []
        while rows:
            batch = self._rest or next(self._batches)
            taken.append(batch.slice(0, rows))
            self._rest = batch.slice(rows) if batch.num_rows > rows else None
            rows -= taken[-1].num_rows
        return taken


_last: _Group | None = None  # the large row group that this process read last


def _read_group_part(part: GroupPart, paths: Collection[str] | None) -> tuple[list[str], list[pa.RecordBatch]]:
    """Return the names of all columns, and the rows.

    A process that reads part after part continues where it stopped.
    """
    global _last
    group = _last
    with _named_errors(part.file):
        if group is None or group.version != _version(part, paths) or group.position > part.start:
            group = _Group(part, paths)
        _last = None  # a reader that failed is not read again
        while group.position < part.start:
            group.read(min(part.batch_rows, part.start - group.position))
        batches = group.read(part.rows)
    _last = group
    return group.names, batches


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
    """Return whether `save_to_disk` of a Dataset or a DatasetDict wrote this folder."""
    return any((folder / name).is_file() for name in ("state.json", "dataset_dict.json"))


def data_set_files(folder: Path) -> list[Path]:
    """Return the Arrow files of a data set on disk, in order.

    Raises:
        UserError: the folder is a DatasetDict or no data set, or one of its files is missing.
    """
    dictionary = folder / "dataset_dict.json"
    if dictionary.is_file():
        splits = _checked_names(read_object(dictionary, COPY_AGAIN).get("splits", []), dictionary, "splits")
        raise UserError(
            f"{folder} holds several splits; name one of them: {', '.join(str(folder / split) for split in splits)}"
        )
    if not is_data_set(folder):
        raise UserError(
            f"{folder} is a folder, but not a data set that datasets' save_to_disk wrote (it has no state.json). "
            f"To read the files in it, give a pattern such as {folder / '*.jsonl'}"
        )
    state = folder / "state.json"
    names = read_object(state, COPY_AGAIN).get("_data_files", [])
    if isinstance(names, list):
        names = [entry.get("filename") if isinstance(entry, dict) else None for entry in names]
    files = [folder / name for name in _checked_names(names, state, "_data_files")]
    for file in files:
        if not file.is_file():
            raise UserError(f"{file} does not exist, but {state} names it. Copy the data set again.")
    return files


def data_set_pieces(folder: Path, size: int) -> Iterator[tuple[StreamRows, int]]:
    """Yield the pieces of a data set on disk, of about `size` bytes each, and the bytes of it up to the end of each."""
    first, before = 0, 0
    for file in data_set_files(folder):
        with _named_errors(file), pa.memory_map(str(file)) as stream, pa.ipc.open_stream(stream) as reader:
            start = 0
            rows = 0
            held = 0
            average = 1
            for batch in reader:
                average = max(1, batch.nbytes // max(1, batch.num_rows))
                left = batch.num_rows
                while left:
                    taken = min(left, max(1, (size - held) // average), PIECE_ROWS - rows)
                    rows += taken
                    held += taken * average
                    left -= taken
                    if held + average > size or rows == PIECE_ROWS:
                        yield StreamRows(file, first, start, rows, _batch_rows(average)), before + stream.tell()
                        first += rows
                        start += rows
                        rows = held = 0
            before += file.stat().st_size
            if rows:
                yield StreamRows(file, first, start, rows, _batch_rows(average)), before
                first += rows


def _checked_names(names: Any, file: Path, key: str) -> list[str]:
    """Return `names` if all are files or folders next to `file`: a data set must not make us read anything else."""
    if not isinstance(names, list) or not all(isinstance(name, str) and _NAME.fullmatch(name) for name in names):
        raise UserError(
            f"{file}: expected under {key!r} the names of files or folders next to it. Copy the data set again."
        )
    return names


# ---------------------------------------------------------------- rows as objects


def _wanted_columns(names: list[str], paths: Collection[str] | None) -> list[str] | None:
    """Return the top-level columns that the dotted paths lead into, or None for all columns."""
    if paths is None:
        return None
    return [name for name in names if any(path == name or path.split(".")[0] == name for path in paths)]


def _refuse_duplicates(names: list[str]) -> None:
    """Raise pa.ArrowException, as for a damaged file, if two columns share a name: an object has one value per name."""
    duplicate = next((name for name in names if names.count(name) > 1), None)
    if duplicate is not None:
        raise pa.ArrowInvalid(f"two of its columns have the name {duplicate!r}")


def _number_rows(batches: Iterable[pa.RecordBatch], names: list[str], first: int) -> Rows:
    """Yield the number and the object of every row.

    A column that was not read is None in the object, so that messages can list it. Its content is not needed.
    """
    blank = dict.fromkeys(names)
    for batch in batches:
        for number, row in enumerate(_objects(batch), start=first):
            yield number, row if isinstance(row, Unreadable) else {**blank, **row}
        first += batch.num_rows


def _objects(batch: pa.RecordBatch) -> list[dict[str, Any] | Unreadable]:
    try:
        return batch.to_pylist()
    except UnicodeDecodeError as error:  # pyarrow checks the bytes of a string only when the string is requested
        unreadable = Unreadable("not_utf8", f"not UTF-8 at byte {error.start + 1} of a text")
    except (OverflowError, ValueError) as error:  # such as a date beyond the year 9999
        unreadable = Unreadable("wrong_type", f"a column holds a value that cannot be read ({error})")
    if batch.num_rows == 1:
        return [unreadable]
    return [row for number in range(batch.num_rows) for row in _objects(batch.slice(number, 1))]


def _batch_rows(average: int) -> int:
    return _clamp(BATCH_BYTES // average, 1, PIECE_ROWS)


def _clamp(value: int, low: int, high: int) -> int:
    return min(max(value, low), high)


@contextmanager
def _named_errors(file: Path) -> Iterator[None]:
    """Turn pyarrow's errors into a UserError that names the file."""
    try:
        yield
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:  # UnicodeDecodeError: names in the file's schema
        kind = "parquet file" if file.suffix == ".parquet" else "Arrow file"
        raise UserError(
            f"{kind} {file} cannot be read: {str(error).strip()}. "
            "It may be cut off or in another format. Make or copy it again."
        ) from None
