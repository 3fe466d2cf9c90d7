"""The parts that all kernel benchmarks share: an operation with its providers, correctness before time, interleaved timing, peak memory.

An operation module describes an `Op`: how to make the tensors of a shape (`make`, a `Problem` that also knows the float64 answer) and a
dict of providers. A provider's builder imports its library and returns a `Step`, a call that goes from the inputs to
everything the operation gives, gradients included. The provider named "floor" is the bare work that no implementation can avoid.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

Results = dict[str, Tensor]
Step = Callable[[], Results]
Row = dict[str, Any]  # one point of the JSON file

FLOOR = "floor"
HELD = "held "  # begins the name of a result that the step adds to memory from before it
QUANTILES = (10, 25, 50, 75, 90)  # percent
LEAST_TURNS, MOST_TURNS = 3, 200

# Largest relative error (norm of the difference over norm of the float64 answer, of each piece of the results) that passes. Gradients may
# be coarser: in bf16 the logits of an implementation that rounds them to bf16 (|x| to 15: off by 0.03) carry 2 % of error into p, while
# leaving p out of a gradient makes an error above 20 % (problems.py chooses such inputs).
LIMITS = {torch.float32: {"value": 1e-5, "gradient": 1e-4}, torch.bfloat16: {"value": 5e-3, "gradient": 5e-2}}


@dataclass(frozen=True)
class Shape:
    tokens: int
    vocab: int
    width: int


class Problem(Protocol):
    """The tensors of one shape."""

    dtype: torch.dtype

    def expected(self) -> Results:
        """The float64 answer, as `sample` picks it."""

    def sample(self, results: Results) -> Results:
        """The rows of a provider's results that are compared; names that begin with "grad" are gradients."""


@dataclass(frozen=True)
class Op:
    name: str
    floor: str  # a description of the floor
    make: Callable[[Shape, torch.device, torch.dtype], Any]
    providers: Mapping[str, Callable[[Any], Step]]  # "floor" among them
    linear: bool = True  # the products with the weight belong to it; else it starts from logits


@dataclass(frozen=True)
class Setting:
    """Where it runs."""

    device: torch.device
    dtype: torch.dtype
    about: Row  # machine, driver, versions, date: goes into every row


def errors(got: Results, expected: Results) -> dict[str, float]:
    """Relative error of every piece, in float64; infinite where a shape differs or a value is not finite."""
    found = {}
    for name, want in expected.items():
        value = got[name].double()
        error = (value - want).norm() / want.norm() if value.shape == want.shape else torch.tensor(torch.inf)
        found[name] = float(error.nan_to_num(torch.inf))
    return found


def wrong_pieces(found: Mapping[str, float], dtype: torch.dtype) -> list[str]:
    return [
        name
        for name, error in found.items()
        if error > LIMITS[dtype]["gradient" if name.startswith("grad") else "value"]
    ]


def clock(device: torch.device) -> float:
    """Seconds: wall time of a GPU; CPU time of the process otherwise, which other processes disturb less."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        return time.perf_counter()
    return time.process_time()


def seconds_of(step: Step, device: torch.device) -> float:
    if device.type != "cuda":
        began = time.process_time()
        step()
        return time.process_time() - began
    events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
    events[0].record()
    step()
    events[1].record()
    torch.cuda.synchronize()
    return events[0].elapsed_time(events[1]) / 1e3


def peak_bytes(step: Step, device: torch.device) -> tuple[Results, int]:
    """Return the results of the step, and the most bytes of tensors it held beyond those that were there before it."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        results = step()
        torch.cuda.synchronize()
        return results, torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        results = step()
    changes = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    if not changes:  # a step that only writes into buffers made before it
        return results, 0
    changes.sort(key=lambda e: e.start_ns())
    return results, int(max(0, np.cumsum([e.nbytes() for e in changes]).max()))


def check_memory_events() -> None:
    """Fails where torch's profiler reports no allocations: peak memory on a CPU would read 0."""
    if peak_bytes(lambda: {"x": torch.ones(1000)}, torch.device("cpu"))[1] < 4000:
        raise SystemExit("torch's profiler reports no allocations, so peak memory cannot be told")


def run_point(op: Op, shape: Shape, setting: Setting, seconds: float) -> list[Row]:
    """One row a provider. `seconds`: about how long the timed turns may take (at least LEAST_TURNS of each)."""
    problem = op.make(shape, setting.device, setting.dtype)
    expected = problem.expected()
    common = _common(op, shape, setting)
    rows: dict[str, Row] = {}
    steps: dict[str, Step] = {}
    for name, build in op.providers.items():
        row = rows[name] = {"provider": name, "status": "ok", **common}
        stage = "absent"  # what an exception below means: the library is not there, or it cannot do this
        try:
            step = build(problem)
            stage = "error"
            if setting.device.type == "cuda":
                warm_up(step)
            results, row["peak_bytes"] = peak_bytes(step, setting.device)
            row["result_bytes"] = sum(
                result.nbytes for result_name, result in results.items() if not result_name.startswith(HELD)
            )
            results = {result_name.removeprefix(HELD): result for result_name, result in results.items()}
            if name != FLOOR:
                row["errors"] = errors(problem.sample(results), expected)
                wrong = wrong_pieces(row["errors"], setting.dtype)
                if wrong:
                    row |= {"status": "FAIL", "reason": f"differs from float64 in {', '.join(wrong)}"}
        except Exception as error:  # a rival's failure of any kind is a result, not the end of the run
            row |= {"status": stage, "reason": f"{type(error).__name__}: {error}"[:500]}
        if row["status"] == "ok":
            steps[name] = step
        step = results = None
        gc.collect()
        if setting.device.type == "cuda":
            torch.cuda.empty_cache()

    if FLOOR not in steps:
        raise RuntimeError(f"{op.name} {shape}: the floor failed with {rows[FLOOR]['reason']}")
    times = take_turns(steps, setting.device, seconds)
    for name, turns in times.items():
        rows[name] |= {
            "turns": len(turns),
            "median_ms": statistics.median(turns) * 1e3,
            "quantiles_ms": {str(q): float(np.percentile(turns, q)) * 1e3 for q in QUANTILES},
            # of the same turn: what slowed both cancels
            "of_floor": statistics.median(a / b for a, b in zip(turns, times[FLOOR], strict=True)),
        }
    return [*rows.values()]


def warm_up(step: Step) -> None:
    """Compiles kernels, allocates workspaces; what the step added to is as before."""
    for name, result in step().items():
        if name.startswith(HELD):
            result.zero_()


def skipped(op: Op, shape: Shape, setting: Setting, reason: str) -> list[Row]:
    return [
        {"provider": name, "status": "skipped", "reason": reason, **_common(op, shape, setting)}
        for name in op.providers
    ]


def _common(op: Op, shape: Shape, setting: Setting) -> Row:
    return {
        "op": op.name,
        **asdict(shape),
        "dtype": str(setting.dtype).removeprefix("torch."),
        "floor_is": op.floor,
        **setting.about,
    }


def take_turns(steps: dict[str, Step], device: torch.device, seconds: float) -> dict[str, list[float]]:
    """Seconds of each turn of each provider."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    order = [*steps.items()]
    began = clock(device)
    for turn in range(MOST_TURNS):
        if turn >= LEAST_TURNS and clock(device) - began > seconds:
            break
        order.append(order.pop(0))  # who goes first changes: a provider pays for the caches its forerunner filled
        for name, step in order:
            times[name].append(seconds_of(step, device))
    return times
