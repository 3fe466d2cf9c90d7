#!/usr/bin/env python3
"""Resolve everything that an installation for GPUs brings, for every supported Python, into launch/constraints-gpu.txt.

Run it after a pin in pyproject.toml or launch/setup.sh has changed, on any Linux machine, with or without a GPU:

    .venv/bin/python launch/constraints.py

pip resolves from its index and installs nothing, but may download wheels of several GB to read their metadata.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FILE = ROOT / "launch" / "constraints-gpu.txt"
EXTRAS = ("gpu", "test")
OLDEST_GLIBC, NEWEST_GLIBC = 17, 31  # minor versions of glibc 2; llguidance, of vLLM, needs 2.31
# Published as source only. pip can read their metadata only where torch for CUDA is installed, so this says what they
# require, by their setup.py.
SOURCE_ONLY = {
    "transformer-engine-torch": ("torch", "einops", "onnxscript", "onnx", "packaging", "pydantic"),
    "flash-attn": ("torch", "einops"),
}
# Of torch's toolkit, so in its version. vLLM's kernel libraries bring the newest nvcc, whose headers do not fit.
TOOLKIT = "cuda-toolkit[cccl,nvcc]"
# pip's --python-version chooses wheels. Markers such as python_version <= "3.12" concern the Python that it runs in,
# unless told otherwise. So does, in pip 23.2, what a package requires of Python.
PIP = """
import sys
import pip._internal.resolution.resolvelib.factory as factory
import pip._vendor.packaging.markers as markers
from pip._internal.cli.main import main
python, own = sys.argv[1], markers.default_environment
markers.default_environment = lambda: {**own(), "python_version": python, "python_full_version": f"{python}.9"}
candidate = factory.RequiresPythonCandidate
factory.RequiresPythonCandidate = lambda _: candidate((*map(int, python.split(".")), 9))
sys.exit(main(sys.argv[2:]))
"""
HEAD = f"""\
# Every version that an installation for GPUs brings, on Python {{pythons}}
# (Linux, x86_64, glibc 2.{NEWEST_GLIBC} or later).
# launch/setup.sh passes it to pip. Made by `python launch/constraints.py`; make it again after a change of the pins.
"""


def main() -> None:
    """Write the file. It takes no arguments."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter).parse_args()
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    pythons = supported_pythons(project)
    wanted, pinned = split_requirements(project)
    resolved = {python: resolve(wanted, python) | pinned for python in pythons}
    FILE.write_text(HEAD.format(pythons=", ".join(pythons)) + "".join(f"{line}\n" for line in merge(resolved)))
    print(f"{FILE}: {len(set().union(*resolved.values()))} packages")


def supported_pythons(project: dict) -> list[str]:
    """Return the versions of Python in the classifiers: ["3.11", ...]."""
    found = (re.fullmatch(r"Programming Language :: Python :: (3\.\d+)", line) for line in project["classifiers"])
    return [match[1] for match in found if match]


def split_requirements(project: dict) -> tuple[list[str], dict[str, str]]:
    """Return what pip resolves, and {name: version} of what it cannot because it is source only."""
    extras = project["optional-dependencies"]
    wanted, pinned = [*project["dependencies"], *build_tools(), TOOLKIT], {}
    for line in [line for extra in (*EXTRAS, "ampere") for line in extras[extra]]:
        name, version = re.fullmatch(r"([a-z0-9-]+)(?:\[.*\])?(?:==(.*)|.*)", line).groups()
        if name == "transformer-engine":
            wanted += [f"{name}=={version}", f"{name}-cu13=={version}"]
            name += "-torch"
        if name in SOURCE_ONLY:
            pinned[name] = version
            wanted += SOURCE_ONLY[name]
        else:
            # Three equals signs: not 2.13.0+cpu, which some machines offer.
            wanted.append(line.replace("==", "==="))
    return wanted, pinned


def build_tools() -> list[str]:
    """Return the packages that launch/setup.sh installs to compile others."""
    return re.search(r"^build_tools=\((.*?)\)", (ROOT / "launch" / "setup.sh").read_text(), re.M)[1].split()


def resolve(wanted: list[str], python: str) -> dict[str, str]:
    """Return {name: version} of all packages that pip would install for `wanted`, from wheels alone."""
    platforms = [f"--platform=manylinux_2_{minor}_x86_64" for minor in range(NEWEST_GLIBC, OLDEST_GLIBC - 1, -1)]
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        options = ["--dry-run", "--ignore-installed", "--only-binary=:all:", f"--target={folder}/nothing"]
        options += [f"--python-version={python}", *platforms, "--platform=manylinux2014_x86_64", f"--report={report}"]
        pip = [sys.executable, "-c", PIP, python, "--disable-pip-version-check", "install", "--quiet"]
        subprocess.run([*pip, *options, *wanted], check=True)
        packages = [package["metadata"] for package in json.loads(report.read_text())["install"]]
    return {re.sub(r"[-_.]+", "-", package["name"]).lower(): package["version"] for package in packages}


def merge(resolved: dict[str, dict[str, str]]) -> list[str]:
    """Return one line per package and version, with a marker where the Pythons need different versions."""
    lines = []
    for name in sorted(set().union(*resolved.values())):
        versions = {python: packages[name] for python, packages in resolved.items() if name in packages}
        if len(set(versions.values())) == 1:
            lines.append(f"{name}=={next(iter(versions.values()))}")
        else:
            lines += [f'{name}=={version}; python_version == "{python}"' for python, version in versions.items()]
    return lines


if __name__ == "__main__":
    main()
