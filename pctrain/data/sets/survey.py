"""The first pass over a set: worker processes hash the text of each record, one chunk of a file at a time."""

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
Hashes = tuple[bytes, np.ndarray | None]  # key and sketch of an entry


@dataclass(frozen=True)
class SurveyEntry:
    """A record that can be used.

    `key` identifies the normal form of its texts. `sketch`, uint64 [bands], is used to search for near-duplicates.
    """

    place: int
    key: bytes
    sketch: np.ndarray | None


def survey(
    data: Data, by: By, near: NearOptions | None, workers: int | None, doing: str
) -> Iterator[SurveyEntry | Fault]:
    """Yield one entry or fault for every record, in order."""
    place = 0
    for results in data.map_chunks(partial(_hash_chunk, data, by, near), doing, workers):
        for result in results:
            yield result if isinstance(result, Fault) else SurveyEntry(place, *result)
            place += 1


def texts(record: Record, by: By) -> tuple[str, ...]:
    """Return the texts of a record that are compared."""
    if by == "question":
        return (record.question,)
    if by == "trajectory":
        return (record.trajectory or "",)
    return (record.question, record.trajectory or "")


def _hash_chunk(data: Data, by: By, near: NearOptions | None, chunk: Chunk) -> list[Hashes | Fault]:
    sketcher = Sketcher(near) if near is not None else None
    results: list[Hashes | Fault] = []
    for item in data.read_chunk(chunk, 0):
        if isinstance(item, Fault):
            results.append(item)
        else:
            compared = texts(item.record, by)
            sketch = None if sketcher is None else sketcher.sketch("\n".join(compared))
            results.append((text_key(*compared), sketch))
    return results
