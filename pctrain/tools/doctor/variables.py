"""Environment variables that make a run slow or wrong."""

from __future__ import annotations

import os

from pctrain.tools.doctor.findings import Finding

# {variable: the value that is noted, and why}; for finding faults, and slow if they stay
FOR_DEBUGGING = {
    "NCCL_P2P_DISABLE": ("1", "GPUs then exchange data through host memory"),
    "NCCL_SHM_DISABLE": ("1", "ranks of one machine then exchange data over the network"),
    "NCCL_IB_DISABLE": ("1", "InfiniBand is not used"),
    "CUDA_LAUNCH_BLOCKING": ("1", "every kernel is waited for"),
    "TORCH_NCCL_BLOCKING_WAIT": ("1", "every collective is waited for"),
}


def environment(where: str) -> list[Finding]:
    """Check the environment variables that make a run slow or wrong. `where` is cpu or gpu."""
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
    return [*findings, *_allocator(), *_debugging()] if where == "gpu" else findings


def _allocator() -> list[Finding]:
    """Check the settings of torch's allocator, of which vLLM's sleep mode must switch expandable segments off."""
    new, old = os.environ.get("PYTORCH_ALLOC_CONF", ""), os.environ.get("PYTORCH_CUDA_ALLOC_CONF", "")
    setting = f"PYTORCH_ALLOC_CONF={new} PYTORCH_CUDA_ALLOC_CONF={old}"
    if new and old and new != old:
        advice = "torch reads PYTORCH_CUDA_ALLOC_CONF, and vLLM the other: set only PYTORCH_CUDA_ALLOC_CONF"
        return [Finding("allocator", setting, "wrong", advice)]
    if "backend:cudaMallocAsync" in new + old:
        advice = "sleep mode needs memory pools of torch's own allocator: leave backend:cudaMallocAsync out"
        return [Finding("allocator", new or old, "wrong", advice)]
    if "expandable_segments:True" in new:
        advice = (
            "vLLM before 0.32 looks for expandable segments in PYTORCH_CUDA_ALLOC_CONF only, and its sleep mode fails "
            "with them: use that name"
        )
        return [Finding("allocator", f"PYTORCH_ALLOC_CONF={new}", "note", advice)]
    return [Finding("allocator", old)] if old else []


def _debugging() -> list[Finding]:
    findings = [
        Finding(name, value, "note", f"{reason}: unset it, unless it works around a fault of this machine")
        for name, (value, reason) in FOR_DEBUGGING.items()
        if os.environ.get(name) == value
    ]
    level = os.environ.get("NCCL_DEBUG", "")
    if level.upper() in ("INFO", "TRACE"):
        findings.append(Finding("NCCL_DEBUG", level, "note", "it prints a great deal: unset it for a long run"))
    return findings
