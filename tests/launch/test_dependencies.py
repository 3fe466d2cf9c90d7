"""launch/dependencies.py offline: direct dependencies, licences to review, and reports of failed queries."""

import importlib.util
import json
import re
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
spec = importlib.util.spec_from_file_location("dependencies", ROOT / "launch" / "dependencies.py")
dependencies = sys.modules["dependencies"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(dependencies)

VERSIONS = {"a": "1.0", "b": "2.0"}


def test_direct_and_indirect_dependencies(monkeypatch):
    there = {
        "top": ("1", ["mid[x]>=1", "absent", 'windows; sys_platform == "win32"', 'pytest; extra == "test"']),
        "mid": ("2", ["Deep_Down", 'extra-of-mid; extra == "x"', 'other; extra == "y"']),
        "deep-down": ("3", ["top"]),
        "extra-of-mid": ("4", []),
        "pytest": ("5", []),
        "other": ("6", []),
        "windows": ("7", []),
    }

    class Found:
        def __init__(self, name):
            if name not in there:
                raise dependencies.PackageNotFoundError(name)
            self.version, self.requires = there[name]

    monkeypatch.setattr(dependencies, "distribution", Found)
    assert dependencies.closure("top", ("test",)) == {"deep-down": "3", "extra-of-mid": "4", "mid": "2", "pytest": "5"}


@pytest.mark.parametrize(
    ("licence", "concern"),
    [
        ("MIT License", ""),
        ("Apache-2.0 WITH LLVM-exception", ""),
        ("BSD-3-Clause", ""),
        ("GPL-3.0-only", "copyleft"),
        ("GNU Affero General Public License v3", "copyleft"),
        ("LGPL-2.1-only", "weak copyleft"),
        ("MPL-2.0 AND MIT", "weak copyleft"),
        ("GNU Lesser General Public License v2 (LGPLv2)", "weak copyleft"),
        ("Other/Proprietary License", "proprietary"),
        ("UNKNOWN", "unknown"),
    ],
)
def test_licences_to_be_looked_at(licence, concern):
    assert dependencies.Package("a", "1", licence).concern == concern


def row(name, **more):
    return {"name": name, "version": "1.0", "vulns": [], **more}


def test_exit_status_and_output():
    clean = dependencies.read_audit(json.dumps({"dependencies": [row("a"), row("B")]}), "", VERSIONS)
    assert clean.status == 0 and dependencies.verdict(2, clean) == "no vulnerability is known in any of the 2 packages"
    known = dependencies.read_audit(
        json.dumps({"dependencies": [row("a", vulns=[{"id": "PYSEC-1", "fix_versions": ["1.1"]}]), row("b")]}),
        "",
        VERSIONS,
    )
    assert known.status == 1 and known.known == [("a", "PYSEC-1", "1.1")]
    assert "1 known vulnerabilities in 1 of 2" in dependencies.verdict(2, known)


@pytest.mark.parametrize(
    ("printed", "errors", "count"),
    [
        (
            json.dumps({"dependencies": [{"name": "a", "skip_reason": "not found"}, row("b")]}),
            "",
            1,
        ),  # as if PyPI were a mirror
        (json.dumps({"dependencies": [row("a")]}), "", 1),
        ("", "ConnectionError: Failed to resolve pypi.org", 2),
        ("null", "", 2),
        ("[]", "", 2),
    ],
)
def test_a_failed_query_is_never_a_clean_result(printed, errors, count):
    found = dependencies.read_audit(printed, errors, VERSIONS)
    said = dependencies.verdict(2, found)
    assert found.status == 3 and len(found.not_asked) == count
    assert said.startswith(f"NOT AUDITED: {count} of 2 packages") and "no vulnerability" not in said


def test_the_page_was_made_by_it_and_says_when():
    text = (ROOT / "docs" / "dependencies.md").read_text()
    rows = re.findall(r"^\| ([\w.-]+) \| \S+ \| (.+?) \|$", text.split("## All")[1].split("|---|\n")[1], re.M)
    assert re.search(r" on 20\d\d-\d\d-\d\d \(Python 3\.1[1-3]\.\d+, Linux", text) and len(rows) > 100
    metadata = tomllib.loads((ROOT / "pyproject.toml").read_text())
    for line in metadata["project"]["dependencies"]:
        name = re.match(r"[a-z0-9-]+", line)[0]
        assert name in dict(rows), f"{name} is not in docs/dependencies.md: make the page again"
    looked_at = text.split("## Licences to check")[1].split("## All")[0]
    for name, licence in rows:
        assert bool(dependencies.Package(name, "", licence).concern) == (f"| {name} |" in looked_at)
