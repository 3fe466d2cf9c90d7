#!/usr/bin/env python3
"""Licences and known vulnerabilities of all that pctrain installs. Run it with the Python of the environment:

    .venv/bin/python launch/dependencies.py                                # a table, and what is to be looked at
    .venv/bin/python launch/dependencies.py > docs/dependencies.md         # the page

pip-licenses and pip-audit do the work, in an environment of their own (.venv/audit, made at the first call), so that what they need is not
counted. Exit status: 0 nothing known against any of them; 1 a vulnerability is known; 3 some or all could not be asked about.
"""

from __future__ import annotations

import json
import platform
import re
import subprocess
import sys
import tempfile
import venv
from dataclasses import dataclass
from datetime import date
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

from packaging.requirements import Requirement

TOOLS = ("pip-licenses==5.5.5", "pip-audit==2.10.1")
EXTRAS = ("cpu", "gpu", "test")  # of pctrain: what of these is installed is counted
KNOWN, CLEAN, NOT_ASKED = 1, 0, 3
# What is to be looked at before pctrain is passed on with it, by the words of a licence; the first that fits.
CONCERNS = (
    (
        "weak copyleft",
        r"\bL?GPL.*with.*exception|\bLGPL|Lesser General Public|\bMPL|Mozilla Public|\bEPL|Eclipse Public|\bCDDL",
    ),
    ("copyleft", r"\bA?GPL|General Public License|\bEUPL|\bCC-BY-SA|\bSSPL"),
    ("proprietary", r"Proprietary|End User|EULA|NVIDIA"),
    ("unknown", r"^UNKNOWN$|^$"),
)


@dataclass(frozen=True)
class Package:
    name: str
    version: str
    licence: str

    @property
    def concern(self) -> str:
        """The word of CONCERNS, or ""."""
        return next((word for word, pattern in CONCERNS if re.search(pattern, self.licence, re.I)), "")


@dataclass(frozen=True)
class Audit:
    """`known`: (package, id of the advisory, versions that mend it); `not_asked`: (package, why)."""

    known: list[tuple[str, str, str]]
    not_asked: list[tuple[str, str]]

    @property
    def status(self) -> int:
        return KNOWN if self.known else NOT_ASKED if self.not_asked else CLEAN


def main() -> int:
    versions = closure("pctrain", EXTRAS)
    tools = make_tools(Path(sys.prefix) / "audit")
    packages, found = licences(tools, versions), audit(tools, versions)
    print(page(packages, found))
    print(verdict(len(versions), found), file=sys.stderr)
    return found.status


# ---- what is installed -----------------------------------------------------------------------------------------------------------


def closure(name: str, extras: tuple[str, ...]) -> dict[str, str]:
    """{name: version} of what `name` needs here, directly or not, itself left out; what is not installed is needed elsewhere."""
    found: dict[str, str] = {}
    seen: set[tuple[str, str]] = set()
    todo = [(name, extra) for extra in ("", *extras)]
    while todo:
        one, extra = todo.pop()
        if (one, extra) in seen:
            continue
        seen.add((one, extra))
        try:
            here = distribution(one)
        except PackageNotFoundError:
            continue
        if one != name:
            found[canonical(one)] = here.version
        for line in here.requires or []:
            requirement = Requirement(line)
            if requirement.marker is None or requirement.marker.evaluate({"extra": extra}):
                todo += [(canonical(requirement.name), wanted) for wanted in ("", *requirement.extras)]
    return dict(sorted(found.items()))


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


# ---- what is asked ---------------------------------------------------------------------------------------------------------------


def make_tools(folder: Path) -> Path:
    """The folder with the programs of TOOLS."""
    stamp = folder / "tools"
    if not stamp.exists() or stamp.read_text() != "\n".join(TOOLS):
        venv.create(folder, with_pip=True, clear=True)
        subprocess.run(
            [folder / "bin" / "python", "-m", "pip", "--disable-pip-version-check", "install", "--quiet", *TOOLS],
            check=True,
        )
        stamp.write_text("\n".join(TOOLS))
    return folder / "bin"


def licences(tools: Path, versions: dict[str, str]) -> list[Package]:
    options = ["--python", sys.executable, "--with-system", "--from=mixed", "--format=json", "--packages", *versions]
    done = subprocess.run([tools / "pip-licenses", *options], capture_output=True, text=True, check=True)
    told = {canonical(row["Name"]): " ".join(row["License"].split()) for row in json.loads(done.stdout)}
    return [Package(name, version, told.get(name, "UNKNOWN")) for name, version in versions.items()]


def audit(tools: Path, versions: dict[str, str]) -> Audit:
    """By the advisories of PyPI. A version of one's own (2.13.0+cpu) is asked about as the release that it was built from."""
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as file:
        file.write("".join(f"{name}=={version.partition('+')[0]}\n" for name, version in versions.items()))
        file.flush()
        command = [
            tools / "pip-audit",
            "--requirement",
            file.name,
            "--no-deps",
            "--disable-pip",
            "--format=json",
            "--progress-spinner=off",
        ]
        done = subprocess.run(command, capture_output=True, text=True)
    return read_audit(done.stdout, done.stderr, versions)


def read_audit(printed: str, errors: str, versions: dict[str, str]) -> Audit:
    """pip-audit ends with status 0 and "No known vulnerabilities found" also where it could ask about none: its lines are counted."""
    try:
        rows = {canonical(row["name"]): row for row in json.loads(printed)["dependencies"]}
    except (ValueError, KeyError, TypeError):
        last = (errors.strip().splitlines() or ["pip-audit printed nothing"])[-1]
        return Audit([], [(name, last[:200]) for name in versions])
    known, not_asked = [], []
    for name in versions:
        row = rows.get(name, {"skip_reason": "pip-audit does not tell of it"})
        if "skip_reason" in row:
            not_asked.append((name, row["skip_reason"]))
        known += [
            (name, one["id"], ", ".join(one.get("fix_versions", [])) or "none yet") for one in row.get("vulns", [])
        ]
    return Audit(known, not_asked)


# ---- what is told ----------------------------------------------------------------------------------------------------------------


def verdict(count: int, found: Audit) -> str:
    asked = count - len(found.not_asked)
    if found.known:
        return f"{len(found.known)} known vulnerabilities in {len({name for name, *_ in found.known})} of {asked} packages asked about"
    if found.not_asked:
        name, why = found.not_asked[0]
        return (
            f"NOT AUDITED: {len(found.not_asked)} of {count} packages: nothing can be said of their vulnerabilities ({name}: {why}). "
            "Run this where the advisory service of PyPI (https://pypi.org/pypi/NAME/VERSION/json) can be reached"
        )
    return f"no vulnerability is known of any of the {count} packages"


def page(packages: list[Package], found: Audit) -> str:
    system = f"Python {platform.python_version()}, {platform.system()} {platform.machine()}"
    concerns = [package for package in packages if package.concern]
    lines = [
        "# Dependencies",
        "",
        f"Made by `python launch/dependencies.py > docs/dependencies.md` on {date.today()} ({system}): what pctrain needs, directly "
        "or not, as it was installed there.",
        "",
        "## Vulnerabilities",
        "",
        f"{verdict(len(packages), found)}.",
        "",
    ]
    if found.known:
        lines += [
            "| package | advisory | mended in |",
            "|---|---|---|",
            *(f"| {' | '.join(row)} |" for row in found.known),
            "",
        ]
    lines += [
        "## To be looked at",
        "",
        "By the words of their metadata. Weak copyleft (LGPL, MPL) binds changes to the package itself, not what uses it.",
        "",
        "| package | version | licence | |",
        "|---|---|---|---|",
        *(f"| {one.name} | {one.version} | {_short(one.licence)} | {one.concern} |" for one in concerns),
        "",
        f"## All {len(packages)}",
        "",
        "| package | version | licence |",
        "|---|---|---|",
        *(f"| {one.name} | {one.version} | {_short(one.licence)} |" for one in packages),
    ]
    return "\n".join(lines)


def _short(licence: str) -> str:
    text = licence.replace("|", "/")
    return text if len(text) <= 100 else f"{text[:97]}..."


if __name__ == "__main__":
    raise SystemExit(main())
