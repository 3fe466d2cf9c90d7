"""Worker processes that apply a function to a stream of items and return the results in the order of the items.

It uses plain processes and pipes: the threads and locks of a ProcessPoolExecutor can hang on Ctrl-C, and its workers
outlive a parent that was killed.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from itertools import chain, islice
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from types import TracebackType
from typing import Generic, TypeVar

from pctrain.common.errors import UserError

AHEAD = 2  # items in flight per worker; bounded because an item and its result may be large
HEARTBEAT = 0.5  # seconds
Input = TypeVar("Input")
Result = TypeVar("Result")


def map_in_order(function: Callable[[Input], Result], items: Iterable[Input], workers: int | None) -> Iterator[Result]:
    """Yield `function(item)` for every item, in order. Memory use does not depend on the number of items.

    Args:
        function: picklable. It and its imports should not need torch, which would cost every worker seconds.
        items: the items.
        workers: number of processes; None means one per core. A single item, or a single worker, is processed in this
            process.

    Raises:
        UserError: a worker was killed, most likely because it ran out of memory.
    """
    workers = workers or len(os.sched_getaffinity(0))
    items = iter(items)
    first = list(islice(items, 2))
    items = chain(first, items)
    if workers == 1 or len(first) < 2:
        yield from map(function, items)
        return
    for result in in_processes(partial(_identity, function), items, workers):
        if result is not None:
            yield result[0]


def in_processes(
    prepare: Callable[[], Callable[[Input], Result]], items: Iterable[Input], workers: int
) -> Iterator[tuple[Result] | None]:
    """Yield (function(item),) for every item, in order, computed by `workers` processes.

    While no result is ready, yield None at least every HEARTBEAT seconds. `prepare()` makes the function, once in each
    process. If several items fail, the exception of the first item is raised, whichever process is faster.

    Raises:
        UserError: a worker was killed, most likely because it ran out of memory.
    """
    todo = iter(items)
    more = True
    with _Workers(prepare, workers) as pool:
        while more or pool.unfinished:
            if more:
                more = pool.hand_out(todo)
            if pool.next_is_ready:
                yield (pool.take_next(),)
            else:
                pool.receive()
                yield None


class _Workers(Generic[Input, Result]):
    """A context manager of worker processes. Leaving it kills them."""

    def __init__(self, prepare: Callable[[], Callable[[Input], Result]], count: int):
        self._prepare, self._count = prepare, count
        self._processes: list[BaseProcess] = []
        self._idle: list[Connection] = []
        self._busy: dict[Connection, int] = {}  # the number of the item that each connection's worker has
        self._finished: dict[int, tuple[Result] | Exception] = {}  # results by item number
        self._handed_out = 0
        self._taken = 0

    def __enter__(self) -> _Workers[Input, Result]:
        context = multiprocessing.get_context(
            "spawn"
        )  # a fork would copy locks that threads of torch and tokenizers hold
        try:
            for _ in range(self._count):
                parent_end, worker_end = context.Pipe()
                process = context.Process(target=_work, args=(worker_end, self._prepare), daemon=True)
                self._processes.append(process)
                process.start()
                worker_end.close()
                self._idle.append(parent_end)
        except BaseException:
            self._kill()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._kill()

    def _kill(self) -> None:
        started = [process for process in self._processes if process.pid is not None]
        for process in started:
            process.kill()
        for process in started:
            process.join()

    @property
    def unfinished(self) -> bool:
        """True while results are still to be taken."""
        return self._taken < self._handed_out

    @property
    def next_is_ready(self) -> bool:
        """True if the result of the next item, in order, has arrived."""
        return self._taken in self._finished

    def hand_out(self, items: Iterator[Input]) -> bool:
        """Send items to idle workers, at most AHEAD per worker in flight. Return False once there are no more items."""
        while self._idle and self._handed_out - self._taken < self._count * AHEAD:
            try:
                item = next(items)
            except StopIteration:
                return False
            connection = self._idle.pop()
            self._busy[connection] = self._handed_out
            try:
                connection.send(item)
            except ConnectionError:
                raise _worker_died() from None
            self._handed_out += 1
        return True

    def take_next(self) -> Result:
        """Return the result of the next item, or raise its exception."""
        result = self._finished.pop(self._taken)
        if isinstance(result, Exception):
            raise result
        self._taken += 1
        return result[0]

    def receive(self) -> None:
        """Receive the results that have arrived. Wait at most HEARTBEAT seconds for one."""
        if not self._busy:
            return
        for ready in wait(list(self._busy), HEARTBEAT):
            if isinstance(ready, Connection):  # all are; `wait` also takes sockets
                number = self._busy.pop(ready)
                try:
                    self._finished[number] = ready.recv()
                except (EOFError, ConnectionError):
                    raise _worker_died() from None
                self._idle.append(ready)


def _worker_died() -> UserError:
    return UserError(
        "a worker process has died, perhaps killed by the system because memory ran out. "
        "Start again with fewer data.workers."
    )


def _work(connection: Connection, prepare: Callable[[], Callable[[Input], Result]]) -> None:
    """Run a worker process: receive items, and send (result,) or the exception, until the parent is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which kills this process
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # there is a worker for every core already
    function = prepare()
    while True:
        try:
            item = connection.recv()
        except EOFError:
            return
        result: tuple[Result] | Exception
        try:
            result = (function(item),)
        except Exception as error:
            result = error
        connection.send(result)


def _identity(function: Callable) -> Callable:
    return function
