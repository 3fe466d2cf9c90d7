"""Shell scripts under test: programs that replace real ones, and calls in a small environment."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path


def executable(path: Path, text: str) -> Path:
    """Write a bash script that can be run; return its path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/usr/bin/env bash\n{text}\n")
    path.chmod(0o755)
    return path


def script(path: Path, *arguments: str, **environment: str) -> tuple[int, str]:
    """Run a script with these variables only; return (exit status, output)."""
    kept = ("PATH", "HOME", "LANG")
    result = subprocess.run(
        ["bash", str(path), *arguments],
        capture_output=True,
        text=True,
        timeout=60,
        env={name: os.environ[name] for name in kept if name in os.environ} | environment,
    )
    return result.returncode, result.stdout + result.stderr
