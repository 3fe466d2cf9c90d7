"""Measure how long this rank waits in collectives; the rest of a phase is its own work, which shows who is slow.

All of torch.distributed goes through the methods of ProcessGroup and `Work.wait`, which are wrapped once per process.
On a CPU the host waits in them. On a GPU the current stream does: two events around a call bound the stream's time
there. That is the collective itself if it runs on this stream, the rest of an asynchronous one if it is waited for, and
otherwise nothing. A stream that is captured into a CUDA graph is not timed. vLLM's CPU ranks of one engine exchange
data through shared memory, so their waits are not measured.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from typing import Any

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

SETTLE_EVERY = 1024  # collectives; runs settle at every step, an evaluation never does

_installed = False
_pairs: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []  # on a GPU: phase, before, after


def measure() -> None:
    """Start reporting waits to `phases`. Idempotent."""
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
    """Report the waits of a GPU that are over to `phases`; a later call reports the others."""
    unfinished = []
    for phase, before, after in _pairs:
        if after.query():
            phases.waited(phase, before.elapsed_time(after) / 1000)
        else:
            unfinished.append((phase, before, after))
    _pairs[:] = unfinished


def _timed(method: Callable[..., Any], begin: Callable[[str], Callable[[], None]]) -> Callable[..., Any]:
    @functools.wraps(method)
    def call(*arguments: Any, **options: Any) -> Any:
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
    if torch.cuda.is_current_stream_capturing():  # an event of the graph could not be asked later
        return lambda: None
    before, after = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    before.record()

    def end() -> None:
        after.record()
        _pairs.append((phase, before, after))
        if len(_pairs) % SETTLE_EVERY == 0:
            settle()

    return end
