"""The records of the files a command was given, each with all of its columns, as often as the command reads them."""

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
    """One record as it stands in its file. `place` counts the records of all files, from 0; `value` has every column."""

    place: int
    where: str  # "<path>:<line or row>"
    value: dict[str, Any]
    record: Record


class Data:
    """Files that are read several times, a chunk in memory at a time.

    paths: files, globs and folders; every file once, in the order given.
    need: what each record must have beside its question.
    """

    def __init__(self, paths: Collection[str | Path], fields: FieldsConfig, need: Collection[str] = ()):
        self.files = list(dict.fromkeys(file for path in paths for file in list_files(path)))
        self.fields, self.need = fields, need
        self._bytes = {file: sum(part.stat().st_size for part in list_disk_files(file)) for file in self.files}

    def items(self, doing: str | None) -> Iterator[Item | Fault]:
        """Every record in order, the same in every reading; a fault in place of one that cannot be used.

        doing: title of the progress bar; none where the caller shows one.
        """
        place = 0
        with self._progress(doing) as done:
            for file in self.files:
                for chunk in split_file(file):
                    for item in self.of_chunk(chunk, place):
                        yield item
                        place += 1
                    done(chunk.done, chunk.file, place)

    def mapped(
        self, function: Callable[[Chunk], list[Result]], doing: str, workers: int | None
    ) -> Iterator[list[Result]]:
        """`function(chunk)` for every part of the files, in order, by worker processes. It gives one result for each of its records."""
        count, handed_out = 0, deque()

        def remembered() -> Iterator[Chunk]:
            for file in self.files:
                for chunk in split_file(file):
                    handed_out.append((chunk.done, file))
                    yield chunk

        with self._progress(doing) as done:
            for results in map_in_order(function, remembered(), workers):
                yield results
                count += len(results)
                done(*handed_out.popleft(), count)

    def of_chunk(self, chunk: Chunk, place: int) -> Iterator[Item | Fault]:
        """The records of one part of a file, the first of which has this place."""
        columns = chunk_columns(chunk, self.fields)
        for number, value in chunk.piece.values():
            yield self._item(place, f"{chunk.file}:{number}", f"{chunk.file.name}:{number}", value, columns)
            place += 1

    @contextmanager
    def _progress(self, doing: str | None) -> Iterator[Callable[[int, Path, int], None]]:
        """Gives a function for (bytes of a file that are done, the file, records so far)."""
        before = dict(zip(self.files, accumulate(self._bytes.values(), initial=0)))
        with progress(doing or "", total=_mb(sum(self._bytes.values())), unit="MB", rank=0 if doing else 1) as bar:
            yield lambda done, file, records: bar.advance(_mb(before[file] + done) - bar.done, records=records)
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
        """The records of `items` that can be used."""
        return (item for item in self.items(doing) if isinstance(item, Item))

    def refuse_empty(self, usable: int, first_fault: Fault | None) -> None:
        """UserError where no record can be used: all that follows would be empty."""
        if not usable:
            names = ", ".join(map(str, self.files))
            raise UserError(
                f"{names}: no record can be used"
                + (f"; the first one: {first_fault}" if first_fault else " (there is none)")
            )


def _mb(size: int) -> int:
    """Bytes as whole MB, rounded up: a small file is 1, not 0."""
    return -(-size // 10**6)
