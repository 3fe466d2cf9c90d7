"""The records of the files a command was given, each with all of its columns, as often as the command reads them."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pctrain.config import FieldsConfig
from pctrain.data.records import Fault, Record, Unreadable, make_record
from pctrain.data.sources import Chunk, chunks, columns_of, files_of
from pctrain.errors import UserError
from pctrain.progress import progress


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
        self.files = list(dict.fromkeys(file for path in paths for file in files_of(path)))
        self.fields, self.need = fields, need
        self._chunks: list[Chunk] = [chunk for file in self.files for chunk in chunks(file)]

    def items(self, doing: str | None) -> Iterator[Item | Fault]:
        """Every record in order, the same in every reading; a fault in place of one that cannot be used. `doing`: the bar's title, or none
        where the caller has a bar."""
        place = 0
        with progress(doing or "", total=len(self._chunks), unit="part", rank=0 if doing else 1) as bar:
            for chunk in self._chunks:
                columns = columns_of(chunk, self.fields)
                for number, value in chunk.piece.values():
                    where = f"{chunk.file}:{number}"
                    try:
                        if isinstance(value, Unreadable):
                            raise value
                        record = make_record(value, f"{chunk.file.name}:{number}", columns, self.need)
                    except Unreadable as error:
                        yield Fault(where, error.cause, str(error))
                    else:
                        yield Item(place, where, value, record)
                    place += 1
                bar.advance(records=place)

    def usable(self, doing: str | None) -> Iterator[Item]:
        """The records of `items` that can be used."""
        return (item for item in self.items(doing) if isinstance(item, Item))

    def refuse_empty(self, usable: int, first_fault: Fault | None) -> None:
        """UserError where no record can be used: all that follows would be empty."""
        if not usable:
            names = ", ".join(map(str, self.files))
            raise UserError(f"{names}: no record can be used" + (f"; the first one: {first_fault}" if first_fault else " (there is none)"))
