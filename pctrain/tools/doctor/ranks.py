"""Rates measured on every rank and between the ranks."""

from __future__ import annotations

from pctrain.tools.doctor.findings import Finding


def measured(where: str) -> list[Finding]:
    """Measure matrix products and copies on this rank's device."""
    from pctrain.tools.doctor import measures

    findings = [
        Finding(f"matrix product, {dtype}", f"{rate / 1e12:.3g} TFLOP/s")
        for dtype, rate in measures.matrix_products().items()
    ]
    return [*findings, Finding(f"copy in {where} memory", f"{measures.copy_bandwidth() / 1e9:.3g} GB/s")]


def between_ranks(where: str) -> list[Finding]:
    """Measure the interconnect between the ranks. Collective."""
    import torch

    from pctrain.distributed import parallel
    from pctrain.tools.doctor import measures

    if parallel.world_size() == 1:
        return []
    name = f"NCCL {'.'.join(map(str, torch.cuda.nccl.version()))}" if where == "gpu" else "gloo"
    rate = measures.all_reduce_bandwidth() / 1e9
    return [Finding(f"all-reduce over {parallel.world_size()} ranks", f"{rate:.3g} GB/s ({name})")]
