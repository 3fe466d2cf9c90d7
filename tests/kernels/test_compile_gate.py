"""Every Triton kernel compiles for GPUs that are not present, and none spills registers.

`PCTRAIN_TRITON=DIR` names another Triton (`pip install --no-deps --target DIR triton==3.6.0`).
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton is not installed")

BENCHMARKS = Path(__file__).parents[2] / "kernels" / "benchmarks"
TRITON = os.environ.get("PCTRAIN_TRITON") or None


def python(*arguments: str) -> subprocess.CompletedProcess:
    """Run the gate in a separate process: this one may have imported Triton already, or set it to interpret."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([*([TRITON] if TRITON else []), str(BENCHMARKS)])
    return subprocess.run([sys.executable, *arguments], env=environment, capture_output=True, text=True, timeout=1200)


@pytest.mark.parametrize("tier", ["fast", pytest.param("full", marks=[pytest.mark.full, pytest.mark.timeout(1200)])])
def test_no_kernel_spills(tier: str, tmp_path: Path) -> None:
    made = python(str(BENCHMARKS / "compile_report.py"), "--tier", tier, "--json", str(tmp_path / "rows.json"))
    print(made.stdout)
    assert made.returncode == 0, made.stderr
    report = json.loads((tmp_path / "rows.json").read_text())
    assert TRITON is None or Path(report["triton_path"]).is_relative_to(Path(TRITON).resolve())
    rows = report["rows"]
    assert {row["specialisation"] for row in rows} == {
        "generic",
        "divisible by 16",
        "not divisible",
        "equal to 1",
        "stride int64",
    }
    assert {row["kernel"] for row in rows} >= {"statistics_kernel", "gradient_kernel"}
    assert all(row["registers"] > 0 and row["spills"] == 0 for row in rows)


def test_a_spill_and_a_kernel_without_entry_are_seen() -> None:
    code = """
import json
import compile_report as report

case = next(case for case in report.cases("fast", (90,)) if case.kernel == "statistics_kernel")
crowded = report.measure(case, maxnreg=32)
del report.ENTRIES["gradient_kernel"]
print(json.dumps(report.faults([crowded])))
"""
    made = python("-c", code)
    assert made.returncode == 0, made.stderr
    spill, unknown = json.loads(made.stdout.splitlines()[-1])
    assert "statistics_kernel" in spill and "spills" in spill and " 0 spills" not in spill
    assert unknown == "gradient_kernel has no entry in compile_report.py"
