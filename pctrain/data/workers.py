"""A function over a stream of items in worker processes, its results in the order of the items.

Plain processes and pipes: the threads and locks of a ProcessPoolExecutor can hang on Ctrl-C, and its workers outlive a
killed parent.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from itertools import chain, islice
from multiprocessing.connection import Connection, wait
from typing import TypeVar

from pctrain.common.errors import UserError

AHEAD = 2  # items in hand for each worker: bounded, as an item and its result may hold data
HEARTBEAT = 0.5  # seconds
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
    for result in in_processes(partial(_itself, function), items, workers):
        if result is not None:
            yield result[0]


def in_processes(
    prepare: Callable[[], Callable[[Item], Result]], items: Iterable[Item], workers: int
) -> Iterator[tuple[Result] | None]:
    """(function(item),) of every item, in order, by `workers` processes; None at least every HEARTBEAT seconds that nothing is ready.

    `prepare()` makes the function, once in each process. Of several items that fail the first one's exception is
    raised, whichever process is the faster.
    """
    context = multiprocessing.get_context("spawn")  # a fork would copy locks that threads of torch and tokenizers hold
    processes: list[multiprocessing.process.BaseProcess] = []
    idle: list[Connection] = []
    busy: dict[Connection, int] = {}
    finished: dict[int, tuple[Result] | Exception] = {}
    todo, due, taken, more = iter(items), 0, 0, True
    try:
        for _ in range(workers):
            ours, theirs = context.Pipe()
            processes.append(context.Process(target=_work, args=(theirs, prepare), daemon=True))
            processes[-1].start()
            theirs.close()
            idle.append(ours)
        while more or due < taken:
            while more and idle and taken - due < workers * AHEAD:
                try:
                    item = next(todo)
                except StopIteration:
                    more = False
                    break
                busy[idle[-1]] = taken
                idle.pop().send(item)
                taken += 1
            if due in finished:
                result = finished.pop(due)
                if isinstance(result, Exception):
                    raise result
                due += 1
                yield result
                continue
            for connection in wait(list(busy), HEARTBEAT) if busy else []:
                finished[busy.pop(connection)] = connection.recv()
                idle.append(connection)
            yield None
    except (EOFError, ConnectionError):
        raise UserError(
            "a worker process has died (killed by the system, for its memory?): start again, with fewer data.workers"
        ) from None
    finally:
        for process in processes:
            process.kill()
        for process in processes:
            process.join()


def _work(connection: Connection, prepare: Callable[[], Callable[[Item], Result]]) -> None:
    """A worker process: takes items, sends (result,) or the exception that one ended in, until the parent is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which kills this process
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # there is a worker for every core already
    function = prepare()
    while True:
        try:
            item = connection.recv()
        except EOFError:
            return
        try:
            result = (function(item),)
        except Exception as error:
            result = error
        connection.send(result)


def _itself(function: Callable) -> Callable:
    return function
