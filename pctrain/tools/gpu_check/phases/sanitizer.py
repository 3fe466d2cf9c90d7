"""The Triton kernels under NVIDIA's compute-sanitizer: memory accesses and races, on small blocks."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from pctrain.tools.gpu_check.check import Check, SkipPhase

TOOLS = ("memcheck", "racecheck")
PLACES = ("/usr/local/cuda/bin", "/opt/nvidia/compute-sanitizer")
REPORTED = 9  # exit status of a program in which the tool found something
REFUSED = "Device not supported"  # in some virtual machines

PROGRAM = """
import torch
from pctrain_kernels.triton_softmax import TritonSoftmax

for dtype, columns in ((torch.float32, 1003), (torch.bfloat16, 8192)):
    logits = torch.randn(6, columns + 5, device="cuda")[:, :columns].to(dtype)
    target = torch.tensor([0, 1, 5, 100, columns - 2, columns - 1], device="cuda")
    block = TritonSoftmax(logits, target, 0.7, want_entropy=True)
    row = block.statistics()
    gradient = block.gradient(row, torch.ones(6, device="cuda"), torch.ones(6, device="cuda"), torch.bfloat16)
    torch.cuda.synchronize()
    assert gradient.isfinite().all()
"""


def run(check: Check) -> None:
    """Run the kernels under each tool; a report fails."""
    if not check.gpu:
        raise SkipPhase("needs a GPU")
    binary = find(os.environ.get("PATH", ""))
    if binary is None:
        raise SkipPhase(f"compute-sanitizer is not found on PATH or in {', '.join(PLACES)}; it comes with CUDA")
    sanitize(check, binary, [sys.executable, "-c", PROGRAM], TOOLS[:1] if check.quick else TOOLS)


def find(path: str) -> str | None:
    """Return the sanitizer's file, from PATH or from CUDA's usual places."""
    return shutil.which("compute-sanitizer", path=os.pathsep.join([path, *PLACES]))


def sanitize(check: Check, binary: str, command: Sequence[str], tools: Sequence[str]) -> None:
    """Record each tool's verdict on the command."""
    # torch's allocator would hide an access to a neighbor's memory.
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    for tool in tools:
        done = subprocess.run(
            [binary, "--tool", tool, "--error-exitcode", str(REPORTED), *command],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        print(done.stdout, flush=True)
        summary = next((line for line in done.stdout.splitlines()[::-1] if "SUMMARY" in line), "no summary")
        if REFUSED in done.stdout:
            check.skip(tool, f"{Path(binary).name} refuses this machine: {REFUSED}")
        else:
            check.expect(tool, done.returncode == 0, f"exit status {done.returncode}, {summary.strip('= ')}")
