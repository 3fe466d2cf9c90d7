"""Writing of records: the suffix gives the format, one batch is in memory at a time, and files appear atomically."""

from __future__ import annotations

import gzip
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from datetime import date, time
from decimal import Decimal
from functools import reduce
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

import pyarrow as pa
import pyarrow.parquet as pq
import zstandard

from pctrain.common.errors import UserError
from pctrain.files.durable import fsync


class BytesWriter(Protocol):
    """A stream that takes bytes."""

    def write(self, data: bytes, /) -> int | None:
        """Write the bytes."""


BATCH_ROWS = 1000  # rows of a parquet file's row groups
# The files are read again and again, so they should unpack fast rather than be small.
GZIP_LEVEL, ZSTD_LEVEL = 6, 3


def write_records(path: Path | str, records: Iterable[Mapping[str, Any]]) -> int:
    """Write the records in the format of the path's suffix, atomically, and return their number.

    In JSON, NaN and infinities become null, dates become their ISO form, and decimals become strings. A parquet file
    has the columns of all records; a column that a record lacks is null in it.

    Raises:
        UserError: the suffix is not .jsonl, .jsonl.gz, .jsonl.zst or .parquet, the format cannot hold a value, or the
            disk is full.
    """
    path = Path(path)
    write = next((write for suffix, write in FORMATS.items() if path.name.endswith(suffix)), None)
    if write is None:
        raise UserError(f"{path}: expected a name that ends with {', '.join(FORMATS)}")
    with _temporary_file(path) as temporary:
        return write(temporary, records, path)


@contextmanager
def _temporary_file(path: Path) -> Iterator[Path]:
    """Give a path next to `path`, and rename the file written there to `path` at the end."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        fsync(temporary)
        os.replace(temporary, path)
        fsync(path.parent)
    except OSError as error:
        raise UserError(
            f"{path} cannot be written: {error.strerror or error}. Free some disk space, or name another path."
        ) from None
    finally:
        temporary.unlink(missing_ok=True)


# ---------------------------------------------------------------- JSON lines


def _write_jsonl(file: Path, records: Iterable[Mapping[str, Any]], path: Path) -> int:
    with open(file, "wb") as stream:
        return _write_lines(stream, records, path)


def _write_gzip(file: Path, records: Iterable[Mapping[str, Any]], path: Path) -> int:
    # The header has neither time nor name, so the same records give the same bytes.
    with open(file, "wb") as raw, gzip.GzipFile("", "wb", GZIP_LEVEL, raw, mtime=0) as stream:
        return _write_lines(stream, records, path)


def _write_zstd(file: Path, records: Iterable[Mapping[str, Any]], path: Path) -> int:
    with (
        open(file, "wb") as raw,
        zstandard.ZstdCompressor(ZSTD_LEVEL, write_checksum=True).stream_writer(raw) as stream,
    ):
        return _write_lines(stream, records, path)


def _write_lines(stream: BytesWriter, records: Iterable[Mapping[str, Any]], path: Path) -> int:
    count = 0
    for record in records:
        count += 1
        try:
            stream.write(_line(record))
        except TypeError as error:
            raise UserError(
                f"{path}: record {count} cannot be written as JSON ({error}). Leave it out, or write .parquet."
            ) from None
    return count


def _line(record: Mapping[str, Any]) -> bytes:
    try:
        text = json.dumps(record, ensure_ascii=False, allow_nan=False, default=_as_text)
    except ValueError:  # NaN or an infinity
        finite = json.loads(json.dumps(record, default=_as_text), parse_constant=lambda _: None)
        text = json.dumps(finite, ensure_ascii=False)
    try:
        return text.encode() + b"\n"
    except UnicodeEncodeError:  # half of a surrogate pair, which a file can only hold as an escape
        return json.dumps(json.loads(text)).encode() + b"\n"


def _as_text(value: Any) -> str:
    if isinstance(value, (date, time)):
        return value.isoformat()
    if isinstance(value, Decimal):
        return str(value)
    raise TypeError(f"a value of type {type(value).__name__}")


# ---------------------------------------------------------------- parquet


def _write_parquet(file: Path, records: Iterable[Mapping[str, Any]], path: Path) -> int:
    """Write in two passes: the type of a column is known only after the last record, as earlier ones may have null."""
    spool = path.with_name(path.name + ".spool.tmp")
    try:
        types, count = _spool(spool, records, path)
        schema = pa.schema(list(reduce(lambda first, second: _join_types(first, second, path), types, pa.struct([]))))
        with pq.ParquetWriter(file, schema, compression="zstd") as writer, pa.OSFile(str(spool)) as stream:
            for _ in types:
                with pa.ipc.open_stream(stream) as reader:
                    rows = [row for batch in reader for row in batch.to_pylist()]
                writer.write_batch(pa.RecordBatch.from_pylist(rows, schema=schema))
    except pa.ArrowException as error:
        raise UserError(f"{path} cannot be written as parquet: {error}. Write .jsonl instead.") from None
    finally:
        spool.unlink(missing_ok=True)
    return count


def _spool(file: Path, records: Iterable[Mapping[str, Any]], path: Path) -> tuple[list[pa.StructType], int]:
    """Write batches of records, each as an Arrow stream with its own schema.

    Return the batches' types and the record count.
    """
    remaining = iter(records)
    types: list[pa.StructType] = []
    count = 0
    with pa.OSFile(str(file), "wb") as stream:
        while rows := list(islice(remaining, BATCH_ROWS)):
            try:
                array = pa.array(rows)
            except (pa.ArrowException, OverflowError, UnicodeEncodeError) as error:
                raise UserError(
                    f"{path}: one of the records {count + 1} to {count + len(rows)} has a value of another type than "
                    f"the others ({error}). {_ONE_TYPE}"
                ) from None
            batch = pa.RecordBatch.from_struct_array(array)
            with pa.ipc.new_stream(stream, batch.schema) as writer:
                writer.write_batch(batch)
            types.append(array.type)
            count += len(rows)
    return types, count


def _join_types(first: pa.DataType, second: pa.DataType, path: Path, name: str = "") -> pa.DataType:
    """Return the type that holds values of both types.

    Numbers are not widened and nothing becomes text: 7 would be read back as 7.0 or '7'.
    """
    if first == second or pa.types.is_null(second):
        return first
    if pa.types.is_null(first):
        return second
    if pa.types.is_struct(first) and pa.types.is_struct(second):
        fields = {field.name: field.type for field in first}
        for field in second:
            known = fields.get(field.name, pa.null())
            fields[field.name] = _join_types(known, field.type, path, f"{name}.{field.name}".lstrip("."))
        return pa.struct(list(fields.items()))
    if pa.types.is_list(first) and pa.types.is_list(second):
        return pa.list_(_join_types(first.value_type, second.value_type, path, name))
    raise UserError(f"{path}: column {name!r} is {first} in some records and {second} in others. {_ONE_TYPE}")


_ONE_TYPE = "A parquet column holds one type. Convert the values to one type, or write .jsonl."

FORMATS: dict[str, Callable[[Path, Iterable[Mapping[str, Any]], Path], int]] = {
    ".jsonl": _write_jsonl,
    ".jsonl.gz": _write_gzip,
    ".jsonl.zst": _write_zstd,
    ".parquet": _write_parquet,
}
