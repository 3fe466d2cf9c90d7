"""Packages that are installed but do not import, and libraries that are loaded twice."""

from __future__ import annotations

import importlib.metadata
import re
import subprocess
import sys
from pathlib import Path

from pctrain.tools.doctor.findings import Finding

IMPORT_SECONDS = 180
IMPORTS = ("torch", "megatron.core", "vllm", "pctrain_kernels")
NEEDED = ("torch", "megatron.core")  # to connect the ranks and measure them
# {module: its distribution}: imported if it is installed. They are compiled against one version of torch.
OPTIONAL_IMPORTS = {"transformer_engine.pytorch": "transformer-engine", "flash_attn": "flash-attn"}
STATEMENTS = {"vllm": "from vllm.platforms import current_platform; current_platform.device_type"}  # loads its kernels
AS_A_RUN = "from pctrain.common.environment import set_environment; set_environment()\n"  # it chooses a cuDNN, too
LIBRARY = "loaded: "
# Prints the files of cuDNN that are loaded after the import.
LOADED_CUDNN = f"""
import re
lines = open("/proc/self/maps").read().splitlines()
for file in sorted({{line.split(maxsplit=5)[-1] for line in lines if re.search(r"/libcudnn[^/]*[.]so", line)}}):
    print("{LIBRARY}" + file)
"""


def imports() -> list[Finding]:
    """Import each package in a separate process, because a failing import can take its process down."""
    findings = []
    for name in (*IMPORTS, *_installed()):
        finding, loaded = _check_import(name)
        findings += [finding, *(_cudnn(loaded) if name == "transformer_engine.pytorch" else ())]
    return findings


def _installed() -> dict[str, str]:
    """Return {module: version} of the optional packages that are installed."""
    versions = {}
    for module, distribution in OPTIONAL_IMPORTS.items():
        try:
            versions[module] = importlib.metadata.version(distribution)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


def _check_import(name: str) -> tuple[Finding, list[str]]:
    """Return the finding, and the files of cuDNN that the import loads."""
    advice = "create the environment again with launch/setup.sh, which installs packages that fit together"
    check = f"import {name}"
    code = AS_A_RUN + STATEMENTS.get(name, check) + LOADED_CUDNN
    try:
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=IMPORT_SECONDS)
    except subprocess.TimeoutExpired:
        return Finding(check, f"took more than {IMPORT_SECONDS} s", "wrong", advice), []
    if done.returncode == 0:
        loaded = [line.removeprefix(LIBRARY) for line in done.stdout.splitlines() if line.startswith(LIBRARY)]
        return Finding(check, "imports", "ok", advice), loaded
    lines = done.stderr.strip().splitlines() or [f"ended with status {done.returncode}"]
    telling = re.compile("undefined symbol|cannot open shared object file")
    line = next((line for line in reversed(lines) if telling.search(line)), lines[-1])
    if "libcudnn" in line and name != "torch":
        advice = "parts of cuDNN are missing where it is looked for: unset CUDNN_PATH and CUDNN_HOME, or name torch's"
    elif telling.search(line) and name != "torch":
        advice = f"it was built for another torch or CUDA than the installed one: {_rebuild(name)}"
    return Finding(check, line, "wrong", advice, stops=name in NEEDED), []


def _rebuild(name: str) -> str:
    version = _installed().get(name)
    if version is None:
        return "create the environment again with launch/setup.sh"
    package = f"{name.partition('.')[0].replace('_', '-')}{'-torch' if name.startswith('transformer') else ''}"
    return f"pip install --no-build-isolation --no-cache-dir --no-deps --force-reinstall {package}=={version}"


def _cudnn(files: list[str]) -> list[Finding]:
    """Check that Transformer Engine and torch load the same cuDNN."""
    folders = sorted({str(Path(file).parent) for file in files})
    if len(folders) < 2:
        return [Finding("cuDNN", folder) for folder in folders]
    from_pip = next((folder for folder in folders if "/nvidia/cudnn" in folder), None)
    path = str(Path(from_pip).parent) if from_pip else "the folder above the one that torch loads"
    advice = (
        "one is expected: Transformer Engine takes the system's before torch's, and parts of two versions do not work "
        f"together. Unset CUDNN_HOME, and set CUDNN_PATH={path}"
    )
    return [Finding("cuDNN", f"{len(folders)} are loaded: {', '.join(folders)}", "wrong", advice)]
