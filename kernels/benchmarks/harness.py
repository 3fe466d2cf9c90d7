"""The parts that all benchmarks share: operations and providers, correctness checks, interleaved timing, peak memory.

A module per operation describes an `Op`: how to make the tensors of a shape (`make` returns `Inputs`, which also know
the float64 answer), and a dict of providers. A provider's builder imports its library and returns a `Step`, a call that
computes everything the operation returns from the inputs, gradients included. The provider named "floor" is the bare
work that no implementation can avoid. For the operations with products there is a second one, "floor, fp32": the same
products with fp32 logits and an fp32 sum of dW, which any implementation must write that rounds only once.
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
FP32_FLOOR = "floor, fp32"
FLOORS = (FLOOR, FP32_FLOOR)
COPIED_BYTES = {"cuda": 2**30, "cpu": 2**25}  # of the copy that measures the bandwidth
COPIES = 5
HELD = "held "  # prefix of a result that the step adds to memory which existed before it
QUANTILES = (10, 25, 50, 75, 90)  # percent
LEAST_TURNS, MOST_TURNS = 3, 200

# Largest relative error that passes: norm of the difference over norm of the float64 answer, for each piece of the
# results. Gradients may be coarser. An implementation that rounds logits to bf16 (|x| to 15: off by 0.03) carries 2% of
# error into p, while leaving p out of a gradient makes an error above 20% (problems.py chooses such inputs).
LIMITS = {torch.float32: {"value": 1e-5, "gradient": 1e-4}, torch.bfloat16: {"value": 5e-3, "gradient": 5e-2}}


@dataclass(frozen=True)
class HeadShape:
    """Tokens, vocabulary entries and hidden size of one measurement."""

    tokens: int
    vocab: int
    width: int


class Inputs(Protocol):
    """The input tensors of one shape."""

    dtype: torch.dtype

    def expected(self) -> Results:
        """Return the float64 answer, in the rows that `sample` picks."""

    def sample(self, results: Results) -> Results:
        """Return the rows of a provider's results that are compared; names that begin with "grad" are gradients."""


@dataclass(frozen=True)
class Op:
    """An operation: its inputs and its providers."""

    name: str
    floor: str  # a description of the floor
    make: Callable[[HeadShape, torch.device, torch.dtype], Any]
    providers: Mapping[str, Callable[[Any], Step]]  # "floor" among them
    products: int = 0  # matrix products of hidden states, weight and logits; 0: it starts from logits


@dataclass(frozen=True)
class Setting:
    """The device and dtype of a run."""

    device: torch.device
    dtype: torch.dtype
    about: Row  # machine, driver, versions and date, which go into every row


def errors(got: Results, expected: Results) -> dict[str, float]:
    """Return the relative error of every piece, in float64; infinite if a shape differs or a value is not finite."""
    by_piece = {}
    for name, want in expected.items():
        value = got[name].double()
        error = (value - want).norm() / want.norm() if value.shape == want.shape else torch.tensor(torch.inf)
        by_piece[name] = float(error.nan_to_num(torch.inf))
    return by_piece


def wrong_pieces(by_piece: Mapping[str, float], dtype: torch.dtype) -> list[str]:
    """Return the names of the pieces whose error is above the limit."""
    limits = LIMITS[dtype]
    return [
        name for name, error in by_piece.items() if error > limits["gradient" if name.startswith("grad") else "value"]
    ]


def clock(device: torch.device) -> float:
    """Return seconds: wall time on a GPU; otherwise CPU time of the process, which other processes disturb less."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        return time.perf_counter()
    return time.process_time()


def seconds_of(step: Step, device: torch.device) -> float:
    """Return the seconds that one call takes."""
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
    """Return the step's results, and the most bytes of tensors that it holds in addition to those before it."""
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
    if not changes:  # the step only writes into buffers that existed before it
        return results, 0
    changes.sort(key=lambda e: e.start_ns())
    return results, int(max(0, np.cumsum([e.nbytes() for e in changes]).max()))


def check_memory_events() -> None:
    """Fail if torch's profiler reports no allocations: peak memory on a CPU would read 0."""
    if peak_bytes(lambda: {"x": torch.ones(1000)}, torch.device("cpu"))[1] < 4000:
        raise SystemExit(
            "torch's profiler reports no allocations, so peak memory cannot be measured; use another version of torch"
        )


def run_point(op: Op, shape: HeadShape, setting: Setting, seconds: float) -> list[Row]:
    """Measure every provider at one shape, and return a row for each.

    `seconds` is about how long the timed turns may take; each provider gets at least LEAST_TURNS.
    """
    problem = op.make(shape, setting.device, setting.dtype)
    expected = problem.expected()
    common = _common(op, shape, setting)
    rows: dict[str, Row] = {}
    steps: dict[str, Step] = {}
    for name, build in op.providers.items():
        row: Row = {"provider": name, "status": "ok", **common}
        rows[name] = row
        step = _built(row, build, problem)
        if step is not None:
            _check(row, step, problem, expected, setting)
        if step is not None and row["status"] == "ok":
            steps[name] = step
        del step
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
            "of_floor": _ratio(turns, times[FLOOR]),
        }
        if FP32_FLOOR in times:
            rows[name]["of_fp32_floor"] = _ratio(turns, times[FP32_FLOOR])
    if FP32_FLOOR in rows:
        extra = fp32_bytes(op, shape, setting.dtype)
        by_bytes = rows[FLOOR]["median_ms"] + extra / copy_bandwidth(setting.device) * 1e3
        rows[FP32_FLOOR] |= {"bytes_beyond_floor": extra, "ms_by_bytes": by_bytes}
    return [*rows.values()]


def _ratio(turns: list[float], floor: list[float]) -> float:
    """Return the median of the ratios within a turn: a disturbance that slowed both cancels."""
    return statistics.median(a / b for a, b in zip(turns, floor, strict=True))


def fp32_bytes(op: Op, shape: HeadShape, dtype: torch.dtype) -> int:
    """Return the bytes that the fp32 floor moves beyond the plain one, which writes everything in `dtype`.

    Logits and dX are written in fp32, and dW is read and written in fp32.
    """
    wider = 4 - dtype.itemsize
    logits = (op.products - 2) * shape.tokens * shape.vocab * wider
    return logits + shape.tokens * shape.width * wider + shape.vocab * shape.width * (4 + wider)


def copy_bandwidth(device: torch.device) -> float:
    """Return the bytes/s that a copy within the device's memory reads and writes, the fastest of a few."""
    source = torch.ones(COPIED_BYTES[device.type], dtype=torch.uint8, device=device)
    target = torch.empty_like(source)

    def copy() -> Results:
        target.copy_(source)
        return {}

    return 2 * len(source) / min(seconds_of(copy, device) for _ in range(COPIES))


def _built(row: Row, build: Callable[[Any], Step], problem: Inputs) -> Step | None:
    """Return the provider's step, or None with the reason in `row` if its library is missing."""
    try:
        return build(problem)
    except Exception as error:  # a rival's failure of any kind is a result, not the end of the run
        row |= {"status": "absent", "reason": f"{type(error).__name__}: {error}"[:500]}
        return None


def _check(row: Row, step: Step, problem: Inputs, expected: Results, setting: Setting) -> None:
    """Run the step once, and put its memory, its errors and any failure into `row`."""
    try:
        if setting.device.type == "cuda":
            warm_up(step)
        results, row["peak_bytes"] = peak_bytes(step, setting.device)
        row["result_bytes"] = sum(result.nbytes for name, result in results.items() if not name.startswith(HELD))
        results = {name.removeprefix(HELD): result for name, result in results.items()}
        if row["provider"] not in FLOORS:
            row["errors"] = errors(problem.sample(results), expected)
            wrong = wrong_pieces(row["errors"], setting.dtype)
            if wrong:
                row |= {"status": "FAIL", "reason": f"differs from float64 in {', '.join(wrong)}"}
    except Exception as error:  # a rival's failure of any kind is a result, not the end of the run
        row |= {"status": "error", "reason": f"{type(error).__name__}: {error}"[:500]}


def warm_up(step: Step) -> None:
    """Call the step once to compile kernels and allocate workspaces, and clear the memory that it adds to."""
    for name, result in step().items():
        if name.startswith(HELD):
            result.zero_()


def skipped(op: Op, shape: HeadShape, setting: Setting, reason: str) -> list[Row]:
    """Return a row without a time for every provider."""
    return [
        {"provider": name, "status": "skipped", "reason": reason, **_common(op, shape, setting)}
        for name in op.providers
    ]


def _common(op: Op, shape: HeadShape, setting: Setting) -> Row:
    return {
        "op": op.name,
        **asdict(shape),
        "dtype": str(setting.dtype).removeprefix("torch."),
        "floor_is": op.floor,
        **setting.about,
    }


def take_turns(steps: dict[str, Step], device: torch.device, seconds: float) -> dict[str, list[float]]:
    """Return the seconds of each turn of each provider."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    order = [*steps.items()]
    began = clock(device)
    for turn in range(MOST_TURNS):
        if turn >= LEAST_TURNS and clock(device) - began > seconds:
            break
        order.append(order.pop(0))  # the order rotates: a provider pays for the caches that the one before it filled
        for name, step in order:
            times[name].append(seconds_of(step, device))
    return times
