"""A lock for folders that one process may use at a time. It dies with its holder, however that dies."""

from __future__ import annotations

import fcntl
import os
import socket
from collections.abc import Callable
from pathlib import Path

from pctrain.common.errors import UserError

_held_here: set[str] = set()


def lock_folder(file: Path) -> Callable[[], None]:
    """Lock `file` for its folder, and return a function that releases the lock. The file is made if it is missing.

    Raises:
        UserError: another process holds the lock; the message names it.
    """
    release = try_lock(file)
    if release is None:
        owner = holder(file)
        raise UserError(
            f"{file.parent} is in use by {owner}; wait for it to end or stop it (kill {owner.split()[1]}), "
            "or set another run.dir"
        )
    return release


def try_lock(file: Path) -> Callable[[], None] | None:
    """Lock `file` and return a function that releases the lock, or None if it is held already.

    A POSIX record lock belongs to this process alone: it dies with it, and forked verifier workers do not keep it alive
    as they would a flock. It does not protect against a second opening in the same process, hence `_held_here`.
    """
    key = os.path.realpath(file)
    if key in _held_here:
        return None
    descriptor = os.open(file, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        return None
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, f"{os.getpid()} {socket.gethostname()}\n".encode(), 0)
    _held_here.add(key)
    owner = os.getpid()

    def release() -> None:
        if os.getpid() == owner:  # a forked child that exits has nothing to release
            _held_here.discard(key)
            os.close(descriptor)

    return release


def holder(file: Path) -> str:
    """Return the process that holds a lock, such as `process 12 on host`, as it wrote itself into the file."""
    if os.path.realpath(file) in _held_here:  # opening and closing the file would release the lock
        return f"process {os.getpid()} on {socket.gethostname()}"
    pid, _, host = file.read_text().strip().partition(" ")
    return f"process {pid or 'unknown'}" + (f" on {host}" if host else "")
