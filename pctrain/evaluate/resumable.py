"""What sampling commands share: work in batches, kept line by line, so that a killed process goes on where it was.

What is sampled depends on weights, prompt, seed and settings, never on the batch: the lines of a process that was killed and started again
are those of one that nobody killed.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any, TypeVar

from pctrain.common.errors import UserError
from pctrain.config.tree import RolloutConfig
from pctrain.distributed import parallel
from pctrain.files.durable import json_line

WAVES = (
    4  # a batch fills the engines' sequences that many times; the next ones begin before it ends, so a kill costs a few
)
Item = TypeVar("Item")


def requests_a_batch(rollout: RolloutConfig) -> int:
    """Over all engines of this job."""
    return WAVES * max(1, parallel.world_size() // rollout.tensor) * rollout.max_sequences


def batches(items: Iterable[Item], size: int) -> Iterator[list[Item]]:
    batch: list[Item] = []
    for item in items:
        batch.append(item)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch


def append(stream: IO[str], values: Iterable[Any]) -> None:
    """A line of JSON each, on the disk when it returns."""
    stream.write("".join(map(json_line, values)))
    stream.flush()
    os.fsync(stream.fileno())


def refuse_other(before: Mapping[str, Any], now: Mapping[str, Any], folder: Path, what: str) -> None:
    """UserError that says which settings of the call that began `folder` differ from this one's, with short values."""
    changed = {
        key: (before.get(key), now.get(key))
        for key in sorted(before.keys() | now.keys())
        if before.get(key) != now.get(key)
    }
    if changed:
        raise UserError(
            f"{folder} holds the {what} of a call with other {', '.join(_told(*one) for one in changed.items())}; repeat that "
            "call to go on, delete the folder to begin anew, or name another --out"
        )


def _told(key: str, values: tuple[Any, Any]) -> str:
    short = (
        all(value is None or isinstance(value, (int, float, str)) for value in values)
        and len("".join(map(str, values))) < 80
    )
    return f"{key} ({values[0]} there, {values[1]} now)" if short else key
