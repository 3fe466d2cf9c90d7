"""The GPUs of a machine."""

from __future__ import annotations

import os

from pctrain.tools.doctor.findings import GB, Finding


def gpus() -> list[Finding]:
    """Check the visible GPUs."""
    from pctrain.tools.doctor import measures

    findings = []
    for gpu in measures.gpus():
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
