"""How often the host waits for the GPU in a step, and how much of a step the GPU is idle."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from pctrain.tools.gpu_check import learning
from pctrain.tools.gpu_check.check import Check
from pctrain.tools.gpu_check.expected import SYNCS_PER_MICRO_BATCH, SYNCS_PER_STEP

if TYPE_CHECKING:
    from pctrain.core import Learner
    from pctrain.data.rows import Row

WAITS = "called a synchronizing CUDA operation"  # torch's warning
FEW, MANY = 2, 6  # micro-batches


def run(check: Check) -> None:
    """Count the waits of a step with few and with many micro-batches; the difference is those of a micro-batch."""
    spec, dtype = ("torch-varlen", "bfloat16") if check.gpu else ("torch", "float32")
    with learning.learner(check, learning.model(check), spec, dtype) as learner:
        learning.steps(check, learner, _packs(check, FEW), 1)  # compiles kernels, makes the optimizer's state
        counts = {n: _waits(check, learner, n) for n in (FEW, MANY)}
        if not check.gpu:
            check.expect("no wait is counted without a GPU", not any(counts.values()))
            check.skip("host syncs", "needs a GPU")
            return
        _record(check, counts[FEW], counts[MANY])
        _idle(check, learner)


def _packs(check: Check, count: int) -> list[Row]:
    """Return rows that fill so many micro-batches, one each."""
    from pctrain.data.rows import make_row

    length = learning.token_budget(check) * 3 // 4
    return [make_row([5, 6, 7], [3 + (i + j) % 300 for j in range(length - 3)]) for i in range(count)]


def _waits(check: Check, learner: Learner, micro_batches: int) -> Counter[str]:
    rows = _packs(check, micro_batches)
    packs = len(learner.pack(rows, learning.token_budget(check)).packs)
    if packs != micro_batches:
        raise RuntimeError(f"{micro_batches} rows became {packs} micro-batches")
    return count_waits(check.gpu, lambda: learning.steps(check, learner, rows, 1))


def count_waits(gpu: bool, act: Callable[[], object]) -> Counter[str]:
    """Return how often torch waited for the GPU during the call, by file and line of the Python call."""
    import torch

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        if gpu:
            torch.cuda.synchronize()
            torch.cuda.set_sync_debug_mode("warn")
        try:
            act()
        finally:
            if gpu:
                torch.cuda.set_sync_debug_mode("default")
    waits = [warning for warning in caught if WAITS in str(warning.message)]
    return Counter(f"{'/'.join(Path(wait.filename).parts[-3:])}:{wait.lineno}" for wait in waits)


def _record(check: Check, few: Counter[str], many: Counter[str]) -> None:
    """Compare the waits with the pinned ones. Kinds and places differ in detail, so the sums are compared."""
    extra = MANY - FEW
    by_place = {place: (many[place] - few[place]) / extra for place in {*few, *many}}
    per_micro_batch = sum(by_place.values())
    per_step = few.total() - FEW * per_micro_batch
    for place, count in sorted(by_place.items()):
        check.measure(f"waits at {place}", count, "per micro-batch", note=f"{few[place]} in a step of {FEW}")
    for name, value, pinned in (
        ("host syncs per micro-batch", per_micro_batch, SYNCS_PER_MICRO_BATCH),
        ("host syncs per step", per_step, SYNCS_PER_STEP),
    ):
        check.measure(name, value, at_most=sum(pinned["sft"].values()))


def _idle(check: Check, learner: Learner) -> None:
    """Report how much of a step no kernel runs."""
    import torch
    from torch.profiler import ProfilerActivity, profile

    rows = _packs(check, MANY)
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiled:
        learning.steps(check, learner, rows, 1)
        torch.cuda.synchronize()
    kernels = [
        (event.time_range.start, event.time_range.end)
        for event in profiled.events()
        if event.device_type == torch.autograd.DeviceType.CUDA and not event.is_user_annotation
    ]
    busy, span = busy_time(kernels)
    check.measure("a step, from its first kernel to its last", span / 1e3, "ms")
    check.measure("share of it without a kernel", 1 - busy / span if span else float("nan"))
    check.measure("gaps per micro-batch", (span - busy) / MANY / 1e3, "ms")


def busy_time(intervals: list[tuple[float, float]]) -> tuple[float, float]:
    """Return the length of the intervals' union, and from the first start to the last end."""
    if not intervals:
        return 0.0, 0.0
    busy, end = 0.0, float("-inf")
    for start, stop in sorted(intervals):
        busy += max(0.0, stop - max(start, end))
        end = max(end, stop)
    return busy, end - min(start for start, _ in intervals)
