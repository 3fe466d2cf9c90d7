"""The records of the files that a command was given, each with all of its columns. They can be read several times."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any, TypeVar

from pctrain.common.errors import UserError
from pctrain.common.progress import progress
from pctrain.config.tree import FieldsConfig
from pctrain.data.columns import Columns
from pctrain.data.records import Fault, Record, Unreadable, make_record
from pctrain.data.sources import Chunk, chunk_columns, list_disk_files, list_files, split_file
from pctrain.data.workers import map_in_order

Result = TypeVar("Result")


@dataclass(frozen=True)
class Item:
    """One record as it is in its file. `place` numbers the records of all files from 0; `value` has every column."""

    place: int
    where: str  # "<path>:<line or row>"
    value: dict[str, Any]
    record: Record


class Data:
    """Files that are read several times, with one chunk in memory at a time.

    Args:
        paths: files, globs and folders. Each file is read once per pass, in the order given.
        fields: names the columns.
        need: the fields that each record must have in addition to its question.
    """

    def __init__(self, paths: Collection[str | Path], fields: FieldsConfig, need: Collection[str] = ()):
        self.files = list(dict.fromkeys(file for path in paths for file in list_files(path)))
        self.fields, self.need = fields, need
        self._bytes = {file: sum(part.stat().st_size for part in list_disk_files(file)) for file in self.files}

    def items(self, doing: str | None) -> Iterator[Item | Fault]:
        """Yield every record in the same order in each pass, with a fault in place of each that cannot be used.

        `doing` is the title of the progress bar; None shows no bar.
        """
        place = 0
        with self._progress(doing) as report:
            for file in self.files:
                for chunk in split_file(file):
                    for item in self.read_chunk(chunk, place):
                        yield item
                        place += 1
                    report(chunk.done, chunk.file, place)

    def map_chunks(
        self, function: Callable[[Chunk], list[Result]], doing: str, workers: int | None
    ) -> Iterator[list[Result]]:
        """Yield `function(chunk)` for every chunk, in order, computed by worker processes.

        The function returns one result for each record of the chunk.
        """
        count = 0
        handed_out: deque[tuple[int, Path]] = deque()

        def chunks() -> Iterator[Chunk]:
            for file in self.files:
                for chunk in split_file(file):
                    handed_out.append((chunk.done, file))
                    yield chunk

        with self._progress(doing) as report:
            for results in map_in_order(function, chunks(), workers):
                yield results
                count += len(results)
                done, file = handed_out.popleft()
                report(done, file, count)

    def read_chunk(self, chunk: Chunk, place: int) -> Iterator[Item | Fault]:
        """Yield the records of one chunk. The first of them has this place."""
        columns = chunk_columns(chunk, self.fields)
        for number, value in chunk.piece.values():
            yield self._item(place, f"{chunk.file}:{number}", f"{chunk.file.name}:{number}", value, columns)
            place += 1

    @contextmanager
    def _progress(self, doing: str | None) -> Iterator[Callable[[int, Path, int], None]]:
        """Show a progress bar.

        Give a function that takes the bytes of a file that are done, the file, and the record count.
        """
        totals = accumulate(self._bytes.values(), initial=0)
        before = dict(zip(self.files, totals, strict=False))  # the last total is that of all files
        with progress(doing or "", total=_mb(sum(self._bytes.values())), unit="MB", rank=0 if doing else 1) as bar:

            def report(done: int, file: Path, records: int) -> None:
                bar.advance(_mb(before[file] + done) - bar.done, records=records)

            yield report
            bar.advance(bar.total - bar.done)

    def _item(
        self, place: int, where: str, identity: str, value: dict[str, Any] | Unreadable, columns: Columns
    ) -> Item | Fault:
        try:
            if isinstance(value, Unreadable):
                raise value
            return Item(place, where, value, make_record(value, identity, columns, self.need))
        except Unreadable as error:
            return Fault(where, error.cause, str(error))

    def usable(self, doing: str | None) -> Iterator[Item]:
        """Yield the records that can be used."""
        return (item for item in self.items(doing) if isinstance(item, Item))

    def refuse_empty(self, usable: int, first_fault: Fault | None) -> None:
        """Raise UserError if no record can be used, because everything that follows would be empty."""
        if usable:
            return
        names = ", ".join(map(str, self.files))
        if first_fault is None:
            raise UserError(
                f"{names}: no record can be used; the data set is empty, expected one record per line or row"
            )
        raise UserError(f"{names}: no record can be used; the first is {first_fault}")


def _mb(size: int) -> int:
    """Return bytes as whole MB, rounded up, so that a small file has 1 MB and not 0."""
    return -(-size // 10**6)
