"""Versions, driver, GPU, and what `pctrain doctor` checks about the machine."""

from __future__ import annotations

import platform
from pathlib import Path
from typing import TYPE_CHECKING

from pctrain.tools.gpu_check.check import Check

if TYPE_CHECKING:
    from pctrain.tools.doctor import Finding

CAPABILITY = 8.0  # bfloat16 matrix products
LEAST_TORCH = (2, 10)


def run(check: Check) -> None:
    """Report the versions; fail where torch is too old or the GPU cannot be used."""
    import torch

    check.inform("python", platform.python_version())
    release = tuple(int(part) for part in torch.__version__.split(".")[:2])
    check.expect("torch", release >= LEAST_TORCH, f"{torch.__version__}, built with CUDA {torch.version.cuda}")
    _triton(check)
    if check.gpu:
        _gpu(check)
    _doctor(check)


def _triton(check: Check) -> None:
    import triton

    check.inform("triton", triton.__version__)


def _gpu(check: Check) -> None:
    import torch

    properties = torch.cuda.get_device_properties(0)
    check.inform("GPU", f"{properties.name}, {properties.multi_processor_count} multiprocessors")
    check.measure("compute capability", properties.major + properties.minor / 10, at_least=CAPABILITY)
    check.measure("GPU memory", properties.total_memory / 2**30, "GiB")
    values = torch.arange(1000, device="cuda")
    check.expect("a sum on the GPU", int(values.sum()) == 499500, f"cuDNN {torch.backends.cudnn.version()}")
    check.inform("NCCL", ".".join(map(str, torch.cuda.nccl.version())))


def _doctor(check: Check) -> None:
    """Record the doctor's findings. Packages are reported only: what a missing one stops is skipped by name."""
    try:
        from pctrain.tools import doctor
    except ImportError as error:
        check.skip("pctrain doctor", f"needs the pinned set: {error.name} is not installed")
        return
    where = "gpu" if check.gpu else "cpu"
    for finding in (*doctor.packages(where), *doctor.environment(where)):
        check.inform(f"doctor: {finding.check}", _note(finding))
    for finding in doctor.machine(Path(check.out)):
        name = finding.check.replace(check.out, "of the results")
        check.expect(f"doctor: {name}", finding.state != "wrong", _note(finding))


def _note(finding: Finding) -> str:
    return finding.result if finding.state == "ok" else f"{finding.result} ({finding.advice})"
