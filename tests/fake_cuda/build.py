"""Compile the shim that lets a CPU build of torch know a CUDA device (shim.cpp); about 2 s, once per torch version."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
from functools import cache
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

SOURCE = Path(__file__).with_name("shim.cpp")
CACHE = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "pctrain"


def missing() -> str | None:
    """Return why the shim cannot be built or used here, or None."""
    if shutil.which("g++") is None:
        return "needs g++ to build tests/fake_cuda/shim.cpp"
    if "+cpu" not in version("torch"):
        return f"needs a CPU build of torch, not {version('torch')}"
    return None


@cache
def library() -> Path:
    """Return the compiled shim for the installed torch; its cache is keyed by torch's version and the source."""
    spec = find_spec("torch")
    assert spec is not None and spec.origin is not None
    torch = Path(spec.origin).parent
    key = hashlib.sha256(f"{torch} {version('torch')}\n{SOURCE.read_text()}".encode()).hexdigest()[:16]
    path = CACHE / f"fake_cuda-torch-{version('torch')}-{key}.so"
    if not path.exists():
        CACHE.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(f".{os.getpid()}")  # several test processes may build at once
        libraries = [f"-L{torch / 'lib'}", "-ltorch_cpu", "-lc10", f"-Wl,-rpath,{torch / 'lib'}"]
        command = ["g++", "-std=c++20", "-shared", "-fPIC", f"-I{torch / 'include'}", SOURCE, *libraries]
        subprocess.run([*command, "-o", temporary], check=True)
        temporary.replace(path)
    return path
