"""A machine with GPUs for the tests of `pctrain doctor`: an `nvidia-smi` on PATH, and torch.cuda as far as it asks.

Each stand-in for a function of torch has the real one's signature, and properties have only real names.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest.mock import create_autospec

import pytest
import torch

# Fields that `nvidia-smi --help-query-gpu` and `--help-query-compute-apps` list, as far as anybody may need them here.
FIELDS = {
    *("index", "uuid", "name", "driver_version", "pci.bus_id", "compute_cap", "mig.mode.current", "memory.total"),
    *("memory.used", "memory.free", "gpu_uuid", "pid", "process_name", "used_memory"),
}
# nvidia-smi as far as it is asked: -L, and the two queries, whose order of columns it takes from the question.
NVIDIA_SMI = """
import json, sys
answers, fields = json.load(open(FILE)), FIELDS
if answers["error"]:
    print(answers["error"]); sys.exit(9)
if sys.argv[1:] == ["-L"]:
    print(answers["listing"]); sys.exit()
assert sys.argv[2:] == ["--format=csv,noheader,nounits"], sys.argv
what, _, names = sys.argv[1].partition("=")
for name in names.split(","):
    if name not in fields:
        print(f'Field "{name}" is not a valid field to query.'); sys.exit(2)
rows = {"--query-gpu": answers["gpus"], "--query-compute-apps": answers["processes"]}[what]
for row in rows:
    print(", ".join(str(row[name]) for name in names.split(",")))
"""


def gpu(number: int, **changes: object) -> dict[str, object]:
    """Return what nvidia-smi says about one H100; memory in MiB."""
    return {
        "index": number,
        "uuid": f"GPU-{number:08x}-34ab-a064-c37c-7a4f75601cc5",
        "name": "NVIDIA H100 80GB HBM3",
        "driver_version": "580.105.08",
        "mig.mode.current": "Disabled",
        "memory.total": 81559,
        "memory.used": 4,
    } | changes


def nvidia_smi(
    patch: pytest.MonkeyPatch,
    folder: Path,
    gpus: Sequence[dict[str, object]] = (),
    processes: Sequence[dict[str, object]] = (),
    slices: Sequence[str] = (),
    error: str = "",
    missing: bool = False,
) -> None:
    """Put an nvidia-smi with these answers first on PATH; `missing`: none anywhere on PATH."""
    folder.mkdir(parents=True, exist_ok=True)
    if missing:
        patch.setenv("PATH", str(folder))
        return
    listing = [f"GPU {number}: {one['name']} (UUID: {one['uuid']})" for number, one in enumerate(gpus)]
    listing += [f"  MIG {name}     Device  {number}: (UUID: MIG-{number})" for number, name in enumerate(slices)]
    answers = {"error": error, "listing": "\n".join(listing), "gpus": list(gpus), "processes": list(processes)}
    (folder / "answers.json").write_text(json.dumps(answers))
    code = NVIDIA_SMI.replace("FILE", repr(str(folder / "answers.json"))).replace("FIELDS", repr(FIELDS))
    (folder / "nvidia-smi").write_text(f"#!{sys.executable}\n{code}")
    (folder / "nvidia-smi").chmod(0o755)
    patch.setenv("PATH", str(folder), prepend=":")


def properties(number: int, **changes: object) -> SimpleNamespace:
    """Return properties of one H100 as torch has them; its PCI address is 0000:1N:00.0."""
    uuid = str(gpu(number)["uuid"]).removeprefix("GPU-")
    values = {"name": "NVIDIA H100 80GB HBM3", "major": 9, "minor": 0, "total_memory": 79 << 30, "uuid": uuid}
    return SimpleNamespace(
        **values | {"pci_domain_id": 0, "pci_bus_id": 16 + number, "pci_device_id": 0} | dict(changes)
    )


def real_names() -> set[str]:
    """Return the names of torch's properties: those it declares, and those that torch itself reads."""
    folder = Path(torch.__file__).parent
    declared = (
        (folder / "_C/__init__.pyi").read_text().partition("class _CudaDeviceProperties:")[2].partition("\n\n")[0]
    )
    read = (folder / "numa/binding.py").read_text()
    return {*re.findall(r"^    (\w+):", declared, re.M), *re.findall(r"device_properties\.(\w+)", read)}


REAL = {
    (owner, name): getattr(owner, name)
    for owner, names in {
        torch.cuda: ("init", "is_available", "device_count", "get_device_properties"),
        torch.cuda.nccl: ("version",),
    }.items()
    for name in names
}


def cuda(
    patch: pytest.MonkeyPatch, devices: Sequence[SimpleNamespace] = (), error: str = "", version: str | None = "13.0"
) -> None:
    """Let torch be built for CUDA and have these devices, or raise `error` when CUDA starts."""
    assert all(set(vars(device)) <= real_names() for device in devices)

    def replace(owner: ModuleType, name: str, **behavior: Any) -> None:
        patch.setattr(owner, name, create_autospec(REAL[owner, name], **behavior))

    patch.setattr(torch.version, "cuda", version)
    replace(torch.cuda, "init", side_effect=RuntimeError(error) if error else None)
    replace(torch.cuda, "is_available", return_value=bool(devices) and not error)
    replace(torch.cuda, "device_count", return_value=len(devices))
    replace(torch.cuda, "get_device_properties", side_effect=lambda device: devices[device])
    replace(torch.cuda.nccl, "version", return_value=(2, 29, 7))
