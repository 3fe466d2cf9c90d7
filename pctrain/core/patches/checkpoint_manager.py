"""Ends the manager process of megatron-core's checkpoint writers together with its run.

The writers report their results through a multiprocessing manager. Upstream's manager outlives a run that is killed.
"""

from __future__ import annotations

import os
from multiprocessing import get_context
from multiprocessing.managers import SyncManager
from queue import Queue

from megatron.core.dist_checkpointing.strategies import filesystem_async

from pctrain.core.child_processes import die_with
from pctrain.core.megatron_version import RESULTS_QUEUE
from pctrain.core.patches.patch import Patch


def _results_queue(mp_mode: str = "spawn") -> Queue:
    if filesystem_async._results_queue is None:
        # Forked, the manager would keep a copy of every page that training changes.
        manager = SyncManager(ctx=get_context(mp_mode))
        manager.start(initializer=die_with, initargs=(os.getpid(),))
        filesystem_async._results_queue = manager.Queue()  # keeps the manager alive
    queue: Queue = filesystem_async._results_queue
    return queue


def _apply() -> None:
    setattr(filesystem_async, RESULTS_QUEUE, _results_queue)


PATCH = Patch(
    package="megatron-core",
    version="0.16.1",
    reason="the manager process of the checkpoint writers outlives a killed run",
    test="tests/core/test_patches.py::test_the_manager_of_the_writers_dies_with_its_run",
    apply=_apply,
)
