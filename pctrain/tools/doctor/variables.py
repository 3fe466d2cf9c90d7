"""Environment variables that make a run slow or wrong."""

from __future__ import annotations

import os

from pctrain.tools.doctor.findings import Finding


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
