"""The first reading of a set: what each record says, as hashes, made by worker processes a part of a file at a time."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Literal

import numpy as np

from pctrain.data.records import Fault, Record
from pctrain.data.sets.near import Sketcher
from pctrain.data.sets.options import NearOptions
from pctrain.data.sets.reading import Data
from pctrain.data.sets.text import text_key
from pctrain.data.sources import Chunk

By = Literal["record", "question", "trajectory"]


@dataclass(frozen=True)
class Entry:
    """A record that can be used. `key`: of the normal form of its texts; `sketch`: uint64 [bands], where near-duplicates are looked for."""

    place: int
    key: bytes
    sketch: np.ndarray | None


def survey(data: Data, by: By, near: NearOptions | None, workers: int | None, doing: str) -> Iterator[Entry | Fault]:
    """One entry, or fault, for every record, in order."""
    place = 0
    for entries in data.mapped(partial(_entries, data, by, near), doing, workers):
        for entry in entries:
            yield entry if isinstance(entry, Fault) else Entry(place, *entry)
            place += 1


def texts(record: Record, by: By) -> tuple[str, ...]:
    """The texts of a record that are compared."""
    parts = {
        "question": (record.question,),
        "trajectory": (record.trajectory,),
        "record": (record.question, record.trajectory),
    }[by]
    return tuple(part or "" for part in parts)


def _entries(
    data: Data, by: By, near: NearOptions | None, chunk: Chunk
) -> list[tuple[bytes, np.ndarray | None] | Fault]:
    sketcher = Sketcher(near) if near is not None else None
    entries = []
    for item in data.of_chunk(chunk, 0):
        if isinstance(item, Fault):
            entries.append(item)
        else:
            compared = texts(item.record, by)
            entries.append(
                (text_key(*compared), sketcher.sketch("\n".join(compared)) if sketcher is not None else None)
            )
    return entries
