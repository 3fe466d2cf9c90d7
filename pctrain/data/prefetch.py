"""The next batch is made while this one is trained on."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from pctrain.distributed.health import watchdog

Batch = TypeVar("Batch")


def prefetch(make: Callable[[int], Batch], steps: range) -> Iterator[tuple[int, Batch, float]]:
    """(step, make(step), seconds waited for it) of each step, in order, made one ahead in a thread. What `make` raises is raised here.

    A thread does: reading and packing are NumPy's and the system's work, and torch gives up the interpreter's lock in its operations.
    """
    with ThreadPoolExecutor(1, thread_name_prefix="prefetch") as pool:
        ahead = pool.submit(make, steps[0]) if steps else None
        for i, step in enumerate(steps, start=1):
            began = time.perf_counter()
            with watchdog.phase("data"):
                batch = ahead.result()
            waited = time.perf_counter() - began
            if i < len(steps):
                ahead = pool.submit(make, steps[i])
            yield step, batch, waited
