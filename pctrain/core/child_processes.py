"""Child processes that end with the process that started them."""

from __future__ import annotations

import ctypes
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager

_PR_SET_PDEATHSIG = 1

_libc = ctypes.CDLL(None)
_forking_parent: int | None = None  # set while a process forks children that must die with it


def die_with(parent: int) -> None:
    """Have the kernel kill this process when `parent`, which started it, ends."""
    _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)


@contextmanager
def children_die_with_this_process() -> Iterator[None]:
    """Tie the life of every child forked inside to this process: a writer would wait forever for a killed run."""
    global _forking_parent
    _forking_parent = os.getpid()
    try:
        yield
    finally:
        _forking_parent = None


def _after_fork() -> None:
    if _forking_parent is not None:
        die_with(_forking_parent)


os.register_at_fork(after_in_child=_after_fork)
