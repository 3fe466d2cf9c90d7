"""The answers of nvidia-smi: GPUs, their driver, MIG slices, and the processes on them.

nvidia-smi needs neither torch nor a CUDA context, and still answers where torch cannot use the driver.
"""

from __future__ import annotations

import subprocess
from dataclasses import dataclass

SECONDS = 60
FIELDS = ("uuid", "name", "driver_version", "mig.mode.current", "memory.total", "memory.used")


@dataclass(frozen=True)
class Gpu:
    """One GPU of the machine; memory is in bytes, 0 where nvidia-smi may not read it."""

    uuid: str
    name: str
    driver: str
    mig: bool
    memory: int
    used: int
    processes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Report:
    """The GPUs and MIG slices of this machine. `error` says why nvidia-smi did not answer; it is empty if it did."""

    gpus: tuple[Gpu, ...] = ()
    slices: tuple[str, ...] = ()
    error: str = ""


def query() -> Report:
    """Ask nvidia-smi about this machine."""
    try:
        table = _rows(f"--query-gpu={','.join(FIELDS)}")
        listing = _run("-L").splitlines()
        processes: dict[str, list[str]] = {}
        for uuid, pid, name in _rows("--query-compute-apps=gpu_uuid,pid,process_name"):
            processes.setdefault(uuid, []).append(f"{pid} ({name})")
    except (OSError, ValueError) as error:
        return Report(error=str(error))
    gpus = tuple(
        Gpu(uuid, name, driver, mig == "Enabled", _bytes(total), _bytes(used), tuple(processes.get(uuid, ())))
        for uuid, name, driver, mig, total, used in table
    )
    return Report(gpus, tuple(line.strip() for line in listing if line.strip().startswith("MIG ")))


def _rows(question: str) -> list[list[str]]:
    width = question.count(",") + 1
    rows = [
        [cell.strip() for cell in line.split(",", width - 1)]
        for line in _run(question, "--format=csv,noheader,nounits").splitlines()
        if line.strip()
    ]
    if any(len(row) != width for row in rows):
        raise ValueError(f"nvidia-smi {question} answered {rows[0]}")
    return rows


def _run(*arguments: str) -> str:
    try:
        done = subprocess.run(["nvidia-smi", *arguments], capture_output=True, text=True, timeout=SECONDS)
    except FileNotFoundError:
        raise OSError("nvidia-smi is not installed") from None
    except subprocess.TimeoutExpired:
        raise OSError(f"nvidia-smi did not answer within {SECONDS} s") from None
    if done.returncode != 0:
        text = (done.stdout + done.stderr).strip()
        raise OSError(" ".join(text.split()) or f"nvidia-smi ended with status {done.returncode}")
    return done.stdout


def _bytes(mebibytes: str) -> int:
    return int(mebibytes) << 20 if mebibytes.isdigit() else 0  # "[N/A]", or "[Insufficient Permissions]" on a slice
