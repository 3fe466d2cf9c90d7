"""Measures how long this rank stands in collectives: what is left of a phase is the rank's own work, and tells who is slow.

All of torch.distributed goes through the methods of ProcessGroup and `Work.wait`; they are wrapped, once a process. On a CPU the host
stands in them. On a GPU the current stream does: two events around a call have between them what the stream did there, which is the
collective itself where it runs on this stream, the rest of an asynchronous one where it is waited for, and else nothing.
vLLM's CPU ranks of one engine exchange through shared memory: their waits for one another are not seen.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable

import torch
from torch.distributed import ProcessGroup, Work

from pctrain.common.device import on_gpu
from pctrain.distributed.health import phases

COLLECTIVES = (
    "allreduce",
    "allreduce_coalesced",
    "reduce",
    "broadcast",
    "barrier",
    "send",
    "recv",
    "recv_anysource",
    "gather",
    "scatter",
    "allgather",
    "allgather_coalesced",
    "_allgather_base",
    "allgather_into_tensor_coalesced",
    "all_gather_single",
    "reduce_scatter",
    "_reduce_scatter_base",
    "reduce_scatter_tensor_coalesced",
    "reduce_scatter_single",
    "alltoall",
    "alltoall_base",
    "all_to_all_single",
    "_end_coalescing",
)

_installed = False
_pairs: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []  # of a GPU: phase, before, after


def measure() -> None:
    """From now on `phase_clock` is told. Idempotent."""
    global _installed
    if _installed:
        return
    _installed = True
    begin = _on_stream if on_gpu() else _on_host
    for name in COLLECTIVES:
        if hasattr(ProcessGroup, name):  # their names differ between torch's versions
            setattr(ProcessGroup, name, _timed(getattr(ProcessGroup, name), begin))
    Work.wait = _timed(Work.wait, begin)


def settle() -> None:
    """Tells `phase_clock` of the waits of a GPU that are over; those that are not are told at a later call."""
    waiting = []
    for phase, before, after in _pairs:
        if after.query():
            phases.waited(phase, before.elapsed_time(after) / 1000)
        else:
            waiting.append((phase, before, after))
    _pairs[:] = waiting


def _timed(method: Callable, begin: Callable[[str], Callable[[], None]]) -> Callable:
    @functools.wraps(method)
    def call(*arguments, **options):
        phase = phases.current()
        if phase is None:
            return method(*arguments, **options)
        end = begin(phase)
        try:
            return method(*arguments, **options)
        finally:
            end()

    return call


def _on_host(phase: str) -> Callable[[], None]:
    began = time.perf_counter()
    return lambda: phases.waited(phase, time.perf_counter() - began)


def _on_stream(phase: str) -> Callable[[], None]:
    before, after = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    before.record()

    def end() -> None:
        after.record()
        _pairs.append((phase, before, after))

    return end
