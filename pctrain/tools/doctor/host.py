"""GPUs of a machine, its memory, /dev/shm, open files, and the folder of the runs."""

from __future__ import annotations

import os
import resource
import shutil
from pathlib import Path

from pctrain.tools.doctor.findings import GB, Finding
from pctrain.tools.doctor.gpus import gpus


def machine(folder: Path) -> list[Finding]:
    """Check GPUs, memory, /dev/shm, the limit of open files, and the folder of the runs."""
    return [*gpus(), *_memory(), _open_files(), _folder(folder)]


def _memory() -> list[Finding]:
    from pctrain.tools.doctor import measures

    findings = []
    left, shared = measures.memory_left(), measures.shared_memory_left()
    if left is not None:
        findings.append(
            Finding(
                "memory left",
                f"{left / GB:.1f} GB",
                "ok" if left > 4 * GB else "wrong",
                "a rank needs about 4 GB besides the model (torch, vLLM, verifiers), and 12 bytes per parameter of its "
                "shard to resume or save (see pctrain plan): end other programs",
            )
        )
    if shared is not None:
        findings.append(
            Finding(
                "/dev/shm",
                f"{shared / GB:.1f} GB free",
                "ok" if shared > GB // 4 else "wrong",
                "ranks of one machine exchange data through it: start the container with --shm-size=8g or --ipc=host",
            )
        )
    return findings


def _open_files() -> Finding:
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    enough = limit >= 4096 or limit == resource.RLIM_INFINITY
    advice = "an engine and many ranks open thousands of files: ulimit -n 65536"
    return Finding("open files", str(limit), "ok" if enough else "note", advice)


def _folder(folder: Path) -> Finding:
    check = f"folder {folder}"
    if not os.access(folder, os.W_OK):
        return Finding(check, "cannot be written", "wrong", "name another one with --folder, and set run.dir to it")
    free = shutil.disk_usage(folder).free
    advice = "a checkpoint takes 16 bytes per parameter (7B: 112 GB): make room, or see run.keep_last"
    return Finding(check, f"{free / GB:.0f} GB free", "ok" if free > 5 * GB else "note", advice)
