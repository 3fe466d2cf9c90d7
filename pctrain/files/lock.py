"""One process at a time in a folder: a lock that dies with its holder, however that dies."""

from __future__ import annotations

import fcntl
import os
import socket
from collections.abc import Callable
from pathlib import Path

from pctrain.common.errors import UserError

_held_here: set[str] = set()


def lock_folder(file: Path) -> Callable[[], None]:
    """Take the lock on `file`, which is made where it is missing, for its folder; returns what releases it.

    UserError naming the process that holds it.
    """
    release = try_lock(file)
    if release is None:
        raise UserError(
            f"{file.parent} is in use by {(who := holder(file))}; wait for it to end or stop it (kill {who.split()[1]}), "
            "or set another run.dir"
        )
    return release


def try_lock(file: Path) -> Callable[[], None] | None:
    """Take the lock on `file`, or None where somebody holds it.

    A POSIX record lock belongs to this process alone: it dies with it, and forked verifier workers do not keep it alive as they
    would a flock. It does not tell two openings of one process apart, hence `_held_here`.
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
    """`process 12 on host`: who holds the lock, by what it wrote there."""
    if os.path.realpath(file) in _held_here:  # opening and closing the file would give the lock up
        return f"process {os.getpid()} on {socket.gethostname()}"
    pid, _, host = file.read_text().strip().partition(" ")
    return f"process {pid or 'unknown'}" + (f" on {host}" if host else "")
