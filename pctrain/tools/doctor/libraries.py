"""Packages that are installed but do not import."""

from __future__ import annotations

import subprocess
import sys

from pctrain.tools.doctor.findings import Finding

IMPORT_SECONDS = 180
IMPORTS = ("megatron.core", "vllm", "pctrain_kernels")


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
