"""The kernels' benchmarks at one real shape: time over both floors, and peak memory."""

from __future__ import annotations

import argparse
import importlib
import sys
from pathlib import Path
from typing import Any

from pctrain.tools.gpu_check.check import Check

BENCHMARKS = Path(__file__).resolve().parents[4] / "kernels" / "benchmarks"
SHAPE, CPU_SHAPE, QUICK_SHAPE = "8192,152064,3584", "512,8000,64", "32,96,8"
SECONDS = 60.0  # of timed turns
LAST_START = 0.65  # of the phase's limit: no operation begins later
PEAK_BYTES = 3e9  # of a linear operation, in addition to inputs, outputs and dW
RATIOS = {"of_floor": "floor", "of_fp32_floor": "fp32 floor"}
OWN = "pctrain_kernels"
# The most important first: the rest may not fit in the time.
ORDER = ("linear_token_loss", "logprob_entropy", "linear_logprob_entropy", "linear_policy_loss", "cross_entropy")


def run(check: Check) -> None:
    """Run the benchmarks of every operation and record a point per provider."""
    sys.path.insert(0, str(BENCHMARKS))
    run_all: Any = importlib.import_module("run_all")
    ops = [name for name in ORDER if name in run_all.OPS] + [name for name in run_all.OPS if name not in ORDER]
    if check.quick:
        ops = ops[:1]
    shape = SHAPE if check.gpu else QUICK_SHAPE if check.quick else CPU_SHAPE
    seconds = SECONDS if check.gpu else 0.0
    arguments = ["--ops", *ops, "--shapes", shape, "--seconds", str(seconds), "--out", str(check.out)]
    arguments += ["--limit", str(LAST_START * check.seconds), "--device", "cuda" if check.gpu else "cpu"]
    options: argparse.Namespace = run_all.parse(arguments)

    def record_all(rows: list[dict[str, Any]]) -> None:
        for row in rows:
            record(check, row)

    run_all.run_options(options, record_all)


def record(check: Check, row: dict[str, Any]) -> None:
    """Record a row of the benchmarks."""
    name = f"{row['op']}, {row['provider']}"
    own = row["provider"].startswith(OWN)
    if row["status"] != "ok":
        reason = f"{row['status']}: {row['reason']}"
        if own and row["status"] != "skipped":
            check.expect(name, False, reason)
        else:
            check.skip(name, reason)
        return
    over = [f"{row[key]:.3f} x {text}" for key, text in RATIOS.items() if key in row]
    check.measure(name, row["median_ms"], "ms", note=", ".join(over))
    if "ms_by_bytes" in row:
        check.measure(f"{name}, by its bytes", row["ms_by_bytes"], "ms")
    if own:
        bound = PEAK_BYTES if row["op"].startswith("linear_") else None
        beyond = row["peak_bytes"] - row["result_bytes"]
        check.measure(f"{name}: memory beyond its results", beyond / 1e9, "GB", at_most=bound and bound / 1e9)
