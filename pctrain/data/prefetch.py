"""Prefetching: the next batch is made while the current one is trained on."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

from pctrain.distributed.health import watchdog

Made = TypeVar("Made")


def prefetch(make: Callable[[int], Made], steps: range) -> Iterator[tuple[int, Made, float]]:
    """Yield (step, make(step), seconds waited for it) for each step, in order.

    Each batch is made one step ahead in a thread.

    An exception in `make` is raised here. A thread is enough: NumPy and the system do the reading and packing, and
    torch releases the interpreter lock in its operations.
    """
    if not steps:
        return
    with ThreadPoolExecutor(1, thread_name_prefix="prefetch") as pool:
        ahead: Future[Made] = pool.submit(make, steps[0])
        for i, step in enumerate(steps, start=1):
            began = time.perf_counter()
            with watchdog.phase("data"):
                batch = ahead.result()
            waited = time.perf_counter() - began
            if i < len(steps):
                ahead = pool.submit(make, steps[i])
            yield step, batch, waited
