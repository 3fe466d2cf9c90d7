"""Faults and delays that forked.py injects into a run before its command starts."""

import ctypes
import os
import sys
import threading
import time
from xml.etree import ElementTree


def _in_step_3(act):
    """Call `act()` on the last rank before the engine samples the third step."""
    from pctrain.distributed.health import watchdog
    from pctrain.rollout.queue import RequestQueue

    sample = RequestQueue.run

    def faulty(self, *arguments, **options):
        if os.environ.get("RANK", "0") == str(int(os.environ.get("WORLD_SIZE", "1")) - 1) and watchdog._step == 3:
            act()
        return sample(self, *arguments, **options)

    RequestQueue.run = faulty


def engine_raises():
    def act():
        raise RuntimeError("the engine ran out of pages")

    _in_step_3(act)


def engine_hangs():
    _in_step_3(lambda: time.sleep(600))


def sft_waits_before_its_end():
    """Block after the last checkpoint and the weights are written, so that a kill comes in time on any machine."""
    from pctrain.sft import loop

    loop._finish = lambda *_: time.sleep(600)


def memory_is_counted():
    """Once a second, return free memory to the system and write `<MB held> <Python blocks>` to `$HELD`-RANK.

    Resident memory is larger: a page with one held object stays resident with all its holes.
    """
    file = f"{os.environ['HELD']}-{os.environ['RANK']}"

    def counts():
        while True:
            ctypes.CDLL(None).malloc_trim(0)
            with open(f"{file}.tmp", "w") as out:
                out.write(f"{_held_by_glibc(file) / 2**20} {sys.getallocatedblocks()}")
            os.replace(f"{file}.tmp", file)
            time.sleep(1)

    threading.Thread(target=counts, daemon=True).start()


def _held_by_glibc(file):
    """Return the bytes allocated and not freed, in all glibc arenas and separate mappings."""
    glibc = ctypes.CDLL(None)
    glibc.fopen.restype = ctypes.c_void_p
    stream = ctypes.c_void_p(glibc.fopen(f"{file}.xml".encode(), b"w"))
    glibc.malloc_info(0, stream)
    glibc.fclose(stream)
    with open(f"{file}.xml") as xml:
        totals = ElementTree.parse(xml).getroot()
    size = {(entry.tag, entry.get("type")): int(entry.get("size")) for entry in totals if entry.get("size")}
    return size["system", "current"] + size["total", "mmap"] - size["total", "fast"] - size["total", "rest"]


def rank_1_is_slow():
    """Sleep in each micro-batch, like a GPU that is too hot."""
    from pctrain.core import step
    from pctrain.run import stragglers

    stragglers.WINDOW_SECONDS = 0.0
    loss = step.PackHead.loss

    def slow(self, *arguments, **options):
        if os.environ.get("RANK") == "1":
            time.sleep(0.04)
        return loss(self, *arguments, **options)

    step.PackHead.loss = slow
