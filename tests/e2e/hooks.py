"""What goes wrong in a forked run (forked.py), done to it before its command starts."""

import ctypes
import os
import threading
import time


def _in_step_3(act):
    """`act()` before the engine samples, on the last rank, in the third step."""
    from pctrain import health
    from pctrain.rollout.queue import RequestQueue

    sample = RequestQueue.run

    def faulty(self, *arguments, **options):
        if os.environ.get("RANK", "0") == str(int(os.environ.get("WORLD_SIZE", "1")) - 1) and health._step == 3:
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
    """With its last checkpoint and its weights written: whoever kills it comes early enough, on a machine of any speed."""
    from pctrain.sft import loop

    loop._finish = lambda *_: time.sleep(600)


def free_memory_is_given_back():
    """Once a second, by glibc: what a rank's memory grows by afterwards is held by somebody, and no hole between allocations."""
    trim = ctypes.CDLL(None).malloc_trim

    def trims():
        while True:
            trim(0)
            time.sleep(1)

    threading.Thread(target=trims, daemon=True).start()


def rank_1_is_slow():
    """At each of its micro-batches, as a GPU that is too hot."""
    from pctrain import stragglers
    from pctrain.core import step

    stragglers.WINDOW_SECONDS = 0.0
    loss = step.Head.loss

    def slow(self, *arguments, **options):
        if os.environ.get("RANK") == "1":
            time.sleep(0.04)
        return loss(self, *arguments, **options)

    step.Head.loss = slow
