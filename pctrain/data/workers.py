"""A function over a stream of items in worker processes, its results in the order of the items."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from itertools import chain, islice
from multiprocessing import connection
from typing import TypeVar

from pctrain.errors import UserError

AHEAD = 2  # items in hand for each worker: bounded, as an item may hold its data
Item = TypeVar("Item")
Result = TypeVar("Result")


def map_in_order(function: Callable[[Item], Result], items: Iterable[Item], workers: int | None) -> Iterator[Result]:
    """`function(item)` of every item, in order. What is in memory does not depend on the number of items.

    Args:
        function: picklable; it and what it imports should not need torch, which would cost every worker seconds.
        workers: processes; default one a core. One item, or one worker, is done in this process.
    Raises:
        UserError: a worker was killed, for want of memory most likely.
    """
    workers, items = workers or len(os.sched_getaffinity(0)), iter(items)
    first = list(islice(items, 2))
    items = chain(first, items)
    if workers == 1 or len(first) < 2:
        yield from map(function, items)
        return
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), _start)
    try:
        waiting: deque[Future[Result]] = deque()
        for item in items:
            waiting.append(pool.submit(function, item))
            if len(waiting) == workers * AHEAD:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    except BrokenProcessPool:
        raise UserError("a worker process was killed, most likely for want of memory; start again, with fewer data.workers") from None
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _start() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which stops this process
    threading.Thread(target=_die_with_parent, daemon=True).start()


def _die_with_parent() -> None:
    """A killed parent cannot stop its workers, and the pool's queue, which they hold open themselves, would let them wait for ever."""
    connection.wait([multiprocessing.parent_process().sentinel])
    os._exit(1)
