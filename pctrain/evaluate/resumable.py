"""Sampling commands in batches, kept line by line, so that a killed process resumes where it was.

Samples depend on weights, prompt, seed and settings, never on the batch: a process that was killed and started again
writes the same lines as one that nobody killed.
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

# A batch fills the engines' sequences this many times. The next batches begin before it ends, so a kill costs a few.
WAVES = 4
Item = TypeVar("Item")


def requests_a_batch(rollout: RolloutConfig) -> int:
    """Return the number of requests in a batch, over all engines of this job."""
    return WAVES * max(1, parallel.world_size() // rollout.tensor) * rollout.max_sequences


def batches(items: Iterable[Item], size: int) -> Iterator[list[Item]]:
    """Yield the items in lists of `size`; the last one may be shorter."""
    batch: list[Item] = []
    for item in items:
        batch.append(item)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch


def append(stream: IO[str], values: Iterable[Any]) -> None:
    """Append values as lines of JSON, and return when they are on the disk."""
    stream.write("".join(map(json_line, values)))
    stream.flush()
    os.fsync(stream.fileno())


def refuse_other(before: Mapping[str, Any], now: Mapping[str, Any], folder: Path, content: str) -> None:
    """Raise UserError if the call that began `folder` had other settings; the message lists them, with short values."""
    changed = {
        key: (before.get(key), now.get(key))
        for key in sorted(before.keys() | now.keys())
        if before.get(key) != now.get(key)
    }
    if changed:
        settings = ", ".join(_describe(key, old, new) for key, (old, new) in changed.items())
        raise UserError(
            f"{folder} holds the {content} of a call with other {settings}; repeat that call to resume it, delete the "
            "folder to start over, or name another --out"
        )


def _describe(key: str, old: Any, new: Any) -> str:
    """Return a key, with its two values if they are short."""
    plain = all(value is None or isinstance(value, (int, float, str)) for value in (old, new))
    if plain and len(f"{old}{new}") < 80:
        return f"{key} ({old} there, {new} now)"
    return key
