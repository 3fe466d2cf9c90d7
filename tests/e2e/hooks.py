"""What goes wrong in a forked run (forked.py), done to it before its command starts."""

import os
import time


def _in_step_3(act):
    """`act()` in the place of the engine's sampling, on the last rank, in the third step."""
    from pctrain import health
    from pctrain.rollout.engine import RolloutEngine

    sample = RolloutEngine._sample

    def faulty(self, *arguments, **options):
        if os.environ.get("RANK", "0") == str(int(os.environ.get("WORLD_SIZE", "1")) - 1) and health._step == 3:
            act()
        return sample(self, *arguments, **options)

    RolloutEngine._sample = faulty


def engine_raises():
    def act():
        raise RuntimeError("the engine ran out of pages")

    _in_step_3(act)


def engine_hangs():
    _in_step_3(lambda: time.sleep(600))


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
