#!/usr/bin/env python3
"""List licences and known vulnerabilities of everything that pctrain installs.

Run it with the Python of the environment:

    .venv/bin/python launch/dependencies.py                                # a table, and what needs attention
    .venv/bin/python launch/dependencies.py > docs/dependencies.md         # the page

pip-licenses and pip-audit do the work in a separate environment (.venv/audit, made by the first call), so that their
own requirements are not counted. Exit status: 0 no vulnerability is known; 1 at least one is known; 3 some or all
packages could not be checked.
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
EXTRAS = ("cpu", "gpu", "ampere", "test")  # of pctrain; what they install is counted if it is there
KNOWN, CLEAN, NOT_ASKED = 1, 0, 3
# Licences that need attention before pctrain is redistributed, by pattern; the first match counts.
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
    """An installed package."""

    name: str
    version: str
    licence: str

    @property
    def concern(self) -> str:
        """Return the name in CONCERNS, or ""."""
        return next((word for word, pattern in CONCERNS if re.search(pattern, self.licence, re.I)), "")


@dataclass(frozen=True)
class Audit:
    """An audit. `known`: (package, advisory id, versions that fix it); `not_asked`: (package, reason)."""

    known: list[tuple[str, str, str]]
    not_asked: list[tuple[str, str]]

    @property
    def status(self) -> int:
        """Return the exit status."""
        return KNOWN if self.known else NOT_ASKED if self.not_asked else CLEAN


def main() -> int:
    """Print the page; the verdict goes to stderr."""
    versions = closure("pctrain", EXTRAS)
    tools = make_tools(Path(sys.prefix) / "audit")
    packages, found = licences(tools, versions), audit(tools, versions)
    print(page(packages, found))
    print(verdict(len(versions), found), file=sys.stderr)
    return found.status


# ---- what is installed -----------------------------------------------------------------------------------------------


def closure(name: str, extras: tuple[str, ...]) -> dict[str, str]:
    """Return {name: version} of everything that `name` requires here, directly or not, without itself.

    A requirement that is not installed belongs to another platform and is skipped.
    """
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
    """Return the normalized name of a package."""
    return re.sub(r"[-_.]+", "-", name).lower()


# ---- checks ----------------------------------------------------------------------------------------------------------


def make_tools(folder: Path) -> Path:
    """Return the folder with the programs of TOOLS; install them if needed."""
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
    """Return the packages with the licences that their metadata names."""
    options = ["--python", sys.executable, "--with-system", "--from=mixed", "--format=json", "--packages", *versions]
    done = subprocess.run([tools / "pip-licenses", *options], capture_output=True, text=True, check=True)
    by_name = {canonical(row["Name"]): " ".join(row["License"].split()) for row in json.loads(done.stdout)}
    return [Package(name, version, by_name.get(name, "UNKNOWN")) for name, version in versions.items()]


def audit(tools: Path, versions: dict[str, str]) -> Audit:
    """Check the versions against PyPI's advisories.

    A local version (2.13.0+cpu) is checked as the release it was built from.
    """
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
    """Return the audit in pip-audit's output.

    pip-audit exits with status 0 and "No known vulnerabilities found" even if it could check no package, so its rows
    are counted.
    """
    try:
        rows = {canonical(row["name"]): row for row in json.loads(printed)["dependencies"]}
    except (ValueError, KeyError, TypeError):
        last = (errors.strip().splitlines() or ["pip-audit printed nothing"])[-1]
        return Audit([], [(name, last[:200]) for name in versions])
    known, not_asked = [], []
    for name in versions:
        row = rows.get(name, {"skip_reason": "pip-audit did not report it"})
        if "skip_reason" in row:
            not_asked.append((name, row["skip_reason"]))
        known += [
            (name, one["id"], ", ".join(one.get("fix_versions", [])) or "none yet") for one in row.get("vulns", [])
        ]
    return Audit(known, not_asked)


# ---- output ----------------------------------------------------------------------------------------------------------


def verdict(count: int, found: Audit) -> str:
    """Return one sentence about the vulnerabilities of `count` packages."""
    asked = count - len(found.not_asked)
    if found.known:
        affected = len({name for name, *_ in found.known})
        return f"{len(found.known)} known vulnerabilities in {affected} of {asked} packages that were checked"
    if found.not_asked:
        name, why = found.not_asked[0]
        return (
            f"NOT AUDITED: {len(found.not_asked)} of {count} packages: "
            f"their vulnerabilities are unknown ({name}: {why}). "
            "Run this where PyPI's advisory service (https://pypi.org/pypi/NAME/VERSION/json) can be reached"
        )
    return f"no vulnerability is known in any of the {count} packages"


def page(packages: list[Package], found: Audit) -> str:
    """Return the page in Markdown."""
    system = f"Python {platform.python_version()}, {platform.system()} {platform.machine()}"
    concerns = [package for package in packages if package.concern]
    lines = [
        "# Dependencies",
        "",
        "This page lists everything that pctrain requires, directly or not. "
        "`python launch/dependencies.py > docs/dependencies.md` made it "
        f"from an installation on {date.today()} ({system}).",
        "",
        "## Vulnerabilities",
        "",
        f"{verdict(len(packages), found)}.",
        "",
    ]
    if found.known:
        lines += [
            "| package | advisory | fixed in |",
            "|---|---|---|",
            *(f"| {' | '.join(row)} |" for row in found.known),
            "",
        ]
    lines += [
        "## Licences to check",
        "",
        "According to package metadata. Weak copyleft (LGPL, MPL) applies to changes of the package itself, "
        "not to code that uses it.",
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
