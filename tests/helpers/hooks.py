"""Faults and delays that forked.py injects into a run before its command starts."""

import ctypes
import os
import sys
import threading
import time
from collections.abc import Callable
from typing import Any
from unittest import mock
from xml.etree import ElementTree


def _in_step_3(act: Callable[[], None]) -> None:
    """Call `act()` on the last rank before the engine samples the third step."""
    from pctrain.distributed.health import watchdog
    from pctrain.rollout.queue import RequestQueue

    sample = RequestQueue.run

    def faulty(self: RequestQueue, *arguments: Any, **options: Any) -> Any:
        if os.environ.get("RANK", "0") == str(int(os.environ.get("WORLD_SIZE", "1")) - 1) and watchdog._step == 3:
            act()
        return sample(self, *arguments, **options)

    mock.patch.object(RequestQueue, "run", faulty).start()


def engine_raises() -> None:
    def act() -> None:
        raise RuntimeError("the engine ran out of pages")

    _in_step_3(act)


def engine_hangs() -> None:
    _in_step_3(lambda: time.sleep(600))


def sft_waits_before_its_end() -> None:
    """Block after the last checkpoint and the weights are written, so that a kill comes in time on any machine."""
    from pctrain.sft import loop

    mock.patch.object(loop, "_finish", side_effect=lambda *_: time.sleep(600)).start()


def memory_is_counted() -> None:
    """Once a second, return free memory to the system and write `<MB held> <Python blocks>` to `$HELD`-RANK.

    Resident memory is larger: a page with one held object stays resident with all its holes.
    """
    file = f"{os.environ['HELD']}-{os.environ['RANK']}"

    def counts() -> None:
        while True:
            ctypes.CDLL(None).malloc_trim(0)
            with open(f"{file}.tmp", "w") as out:
                out.write(f"{_held_by_glibc(file) / 2**20} {sys.getallocatedblocks()}")
            os.replace(f"{file}.tmp", file)
            time.sleep(1)

    threading.Thread(target=counts, daemon=True).start()


def _held_by_glibc(file: str) -> int:
    """Return the bytes allocated and not freed, in all glibc arenas and separate mappings."""
    glibc = ctypes.CDLL(None)
    glibc.fopen.restype = ctypes.c_void_p
    stream = ctypes.c_void_p(glibc.fopen(f"{file}.xml".encode(), b"w"))
    glibc.malloc_info(0, stream)
    glibc.fclose(stream)
    with open(f"{file}.xml") as xml:
        totals = ElementTree.parse(xml).getroot()
    size = {(entry.tag, entry.get("type")): int(entry.get("size", "")) for entry in totals if entry.get("size")}
    return size["system", "current"] + size["total", "mmap"] - size["total", "fast"] - size["total", "rest"]


def rank_1_is_slow() -> None:
    """Sleep in each micro-batch, like a GPU that is too hot."""
    from pctrain.core import step
    from pctrain.run import stragglers

    stragglers.WINDOW_SECONDS = 0.0
    loss = step.PackHead.loss

    def slow(self: step.PackHead, *arguments: Any, **options: Any) -> Any:
        if os.environ.get("RANK") == "1":
            time.sleep(0.04)
        return loss(self, *arguments, **options)

    mock.patch.object(step.PackHead, "loss", slow).start()
