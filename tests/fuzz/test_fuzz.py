"""Each target for a moment with the same examples; in the full tier, all four together for a quarter of an hour."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.fuzz.__main__ import TARGETS, target_named
from tests.fuzz.campaign import campaign
from tests.fuzz.case import Case

ROOT = Path(__file__).resolve().parents[2]
MINUTES = float(os.environ.get("PCTRAIN_FUZZ_MINUTES", "15"))
# Of the fast tier. Making the folders of `checkpoints` takes as long as fuzzing the others.
EXAMPLES = {"config": 200, "data": 120, "checkpoints": 100, "curves": 100}


@pytest.mark.parametrize("name", TARGETS)
def test_nothing_but_success_and_clear_errors(name, tmp_path):
    outcome = campaign(target_named(name), tmp_path, examples=EXAMPLES[name])
    print(outcome.line())
    assert not outcome.findings, "\n".join(path.with_suffix(".txt").read_text() for path in outcome.findings.values())
    assert outcome.examples == EXAMPLES[name]
    assert outcome.accepted > 5 and outcome.refused > 5, (
        outcome.line()
    )  # what is all refused at the door tests the door alone


@pytest.mark.full
@pytest.mark.timeout(MINUTES * 60 + 600)
def test_a_quarter_of_an_hour_of_each(tmp_path):
    """PCTRAIN_FUZZ_MINUTES shortens it. What is found is kept in fuzz-findings, with the command that replays it."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")])}
    findings = ROOT / "fuzz-findings"
    command = [sys.executable, "-m", "tests.fuzz", "--minutes", str(MINUTES), "--findings", str(findings)]
    running = [
        (
            name,
            subprocess.Popen(
                [*command, name],
                stdout=(tmp_path / name).open("w"),
                stderr=subprocess.STDOUT,
                env=environment,
                cwd=ROOT,
            ),
        )
        for name in TARGETS
    ]
    failed = []
    try:
        for name, process in running:
            status = process.wait()
            said = (tmp_path / name).read_text()
            print(said.splitlines()[-1] if said else f"fuzz {name}: nothing said")
            failed += [said] if status else []
    finally:
        for _, process in running:
            process.kill()
    assert not failed, "\n".join(failed)


class _Broken:
    """A target with one reader that fails as the case says."""

    NAME = "broken"

    def __init__(self, cases):
        self.CASES = cases

    def prepare(self, folder):
        return {}

    def run(self, case, folder):
        from pctrain.common.errors import UserError

        if case.action == "raises":
            raise KeyError("x")
        if case.action == "is killed":
            os.kill(os.getpid(), 11)
        if case.action == "loops":
            while True:
                pass
        if case.action == "takes memory":
            bytearray(1 << 40)
        if case.action == "says nothing":
            raise UserError("")
        if case.action == "leaves a part":
            (folder / "out.jsonl.tmp").touch()
            raise UserError("refused")
        if case.action == "refuses":
            raise UserError("refused")


@pytest.mark.parametrize(
    "action, found",
    [
        ("raises", "KeyError"),
        ("is killed", "died"),
        ("loops", "TooSlow"),
        ("takes memory", "MemoryError"),
        ("says nothing", "Unclean"),
        ("leaves a part", "Unclean"),
    ],
)
def test_a_campaign_finds(action, found, tmp_path, monkeypatch):
    from hypothesis import strategies as st

    monkeypatch.setattr("tests.fuzz.campaign.CPU_SECONDS", 0.5)
    cases = st.sampled_from(["accepts", "refuses", action]).map(lambda name: Case(name, {"a": b"\0"}))
    outcome = campaign(_Broken(cases), tmp_path, examples=6)
    [(name, path)] = outcome.findings.items()
    assert found in name and Case.read(path) == Case(action, {"a": b"\0"})
