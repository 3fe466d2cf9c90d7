"""Records into files: the form by the suffix, a batch in memory at a time, written beside and renamed."""

from __future__ import annotations

import gzip
import json
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from datetime import date, time
from decimal import Decimal
from functools import reduce
from itertools import islice
from pathlib import Path
from typing import IO, Any

import pyarrow as pa
import pyarrow.parquet as pq
import zstandard

from pctrain.common.errors import UserError
from pctrain.files.durable import fsync

BATCH_ROWS = 1000  # of a parquet file's row groups
# One line after the other; what is read again and again should unpack fast more than it should be small.
GZIP_LEVEL, ZSTD_LEVEL = 6, 3


def write_records(path: Path | str, records: Iterable[dict[str, Any]]) -> int:
    """Writes the records in the form of the path's suffix and returns how many there were.

    `path` is there whole or not at all.

    In JSON, NaN and infinities become null, dates their ISO form and decimals strings. A parquet file has every column
    of any record; where a record lacks one it is null.

    Raises:
        UserError: a suffix that is not .jsonl, .jsonl.gz, .jsonl.zst or .parquet; a value that the form cannot hold; a
            disk that is full.
    """
    path = Path(path)
    write = next((write for suffix, write in FORMATS.items() if path.name.endswith(suffix)), None)
    if write is None:
        raise UserError(f"{path}: expected a name that ends with {', '.join(FORMATS)}")
    with _beside(path) as temporary:
        return write(temporary, records, path)


@contextmanager
def _beside(path: Path) -> Iterator[Path]:
    temporary = path.with_name(path.name + ".tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        fsync(temporary)
        os.replace(temporary, path)
        fsync(path.parent)
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror or error}") from None
    finally:
        temporary.unlink(missing_ok=True)


# ---------------------------------------------------------------- JSON lines


def _write_jsonl(file: Path, records: Iterable[dict[str, Any]], path: Path) -> int:
    with open(file, "wb") as stream:
        return _write_lines(stream, records, path)


def _write_gzip(file: Path, records: Iterable[dict[str, Any]], path: Path) -> int:
    # Without the time of day and the name in its header, the same records give the same bytes.
    with open(file, "wb") as raw, gzip.GzipFile("", "wb", GZIP_LEVEL, raw, mtime=0) as stream:
        return _write_lines(stream, records, path)


def _write_zstd(file: Path, records: Iterable[dict[str, Any]], path: Path) -> int:
    with (
        open(file, "wb") as raw,
        zstandard.ZstdCompressor(ZSTD_LEVEL, write_checksum=True).stream_writer(raw) as stream,
    ):
        return _write_lines(stream, records, path)


def _write_lines(stream: IO[bytes], records: Iterable[dict[str, Any]], path: Path) -> int:
    count = 0
    for record in records:
        count += 1
        try:
            stream.write(_line(record))
        except TypeError as error:
            raise UserError(
                f"{path}: record {count} cannot be written as JSON ({error}); leave it out, or write .parquet"
            ) from None
    return count


def _line(record: dict[str, Any]) -> bytes:
    try:
        text = json.dumps(record, ensure_ascii=False, allow_nan=False, default=_in_words)
    except ValueError:  # NaN or an infinity
        finite = json.loads(json.dumps(record, default=_in_words), parse_constant=lambda _: None)
        text = json.dumps(finite, ensure_ascii=False)
    try:
        return text.encode() + b"\n"
    except UnicodeEncodeError:  # half of a surrogate pair: in a file it can stand as an escape alone
        return json.dumps(json.loads(text)).encode() + b"\n"


def _in_words(value: Any) -> str:
    if isinstance(value, (date, time)):
        return value.isoformat()
    if isinstance(value, Decimal):
        return str(value)
    raise TypeError(f"a value of type {type(value).__name__}")


# ---------------------------------------------------------------- parquet


def _write_parquet(file: Path, records: Iterable[dict[str, Any]], path: Path) -> int:
    """In two passes: what type a column has is known after the last record, as the first ones may have null or nothing there."""
    spool = path.with_name(path.name + ".spool.tmp")
    try:
        types, count = _spool(spool, records, path)
        schema = pa.schema(list(reduce(lambda one, other: _joined(one, other, path), types, pa.struct([]))))
        with pq.ParquetWriter(file, schema, compression="zstd") as writer, pa.OSFile(str(spool)) as stream:
            for _ in types:
                with pa.ipc.open_stream(stream) as reader:
                    rows = [row for batch in reader for row in batch.to_pylist()]
                writer.write_batch(pa.RecordBatch.from_pylist(rows, schema=schema))
    except pa.ArrowException as error:
        raise UserError(f"{path} cannot be written as parquet: {error}") from None
    finally:
        spool.unlink(missing_ok=True)
    return count


def _spool(file: Path, records: Iterable[dict[str, Any]], path: Path) -> tuple[list[pa.StructType], int]:
    """Writes batches of the records, each as an Arrow stream with a schema of its own; the types of the batches, and the records."""
    records, types, count = iter(records), [], 0
    with pa.OSFile(str(file), "wb") as stream:
        while rows := list(islice(records, BATCH_ROWS)):
            try:
                array = pa.array(rows)
            except (pa.ArrowException, OverflowError, UnicodeEncodeError) as error:
                raise UserError(
                    f"{path}: one of the records {count + 1} to {count + len(rows)} does not fit into a column of the others "
                    f"({error}); a parquet column holds one type: make the values alike, or write .jsonl"
                ) from None
            batch = pa.RecordBatch.from_struct_array(array)
            with pa.ipc.new_stream(stream, batch.schema) as writer:
                writer.write_batch(batch)
            types.append(array.type)
            count += len(rows)
    return types, count


def _joined(one: pa.DataType, other: pa.DataType, path: Path, name: str = "") -> pa.DataType:
    """The type that values of both types have.

    Numbers are not widened and nothing becomes text: 7 would come back as 7.0 or '7'.
    """
    if one == other or pa.types.is_null(other):
        return one
    if pa.types.is_null(one):
        return other
    if pa.types.is_struct(one) and pa.types.is_struct(other):
        fields = {field.name: field.type for field in one}
        for field in other:
            known = fields.get(field.name, pa.null())
            fields[field.name] = _joined(known, field.type, path, f"{name}.{field.name}".lstrip("."))
        return pa.struct(list(fields.items()))
    if pa.types.is_list(one) and pa.types.is_list(other):
        return pa.list_(_joined(one.value_type, other.value_type, path, name))
    raise UserError(
        f"{path}: column {name!r} is {one} in some records and {other} in others; a parquet column holds one type: make the "
        "values alike, or write .jsonl"
    )


FORMATS: dict[str, Callable[[Path, Iterable[dict[str, Any]], Path], int]] = {
    ".jsonl": _write_jsonl,
    ".jsonl.gz": _write_gzip,
    ".jsonl.zst": _write_zstd,
    ".parquet": _write_parquet,
}
