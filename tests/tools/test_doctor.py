"""`pctrain doctor`: its findings and advice; and docs/gpu.md, which lists every file with a GPU branch."""

import re
from pathlib import Path

import pytest

from pctrain.cli.main import main
from pctrain.tools import doctor
from pctrain.tools.doctor import Finding, Package, combined

ROOT = Path(__file__).resolve().parents[2]


def by_check(findings):
    return {finding.check: finding for finding in findings}


def test_versions_are_compared_with_the_known_good_ones(monkeypatch):
    monkeypatch.setattr(
        doctor,
        "PACKAGES",
        (
            Package("torch", "tensors", least="2.10"),
            Package("numpy", "arrays", exactly="0.0.1"),
            Package("vllm", "rollouts", "gpu"),
            Package("no-such-thing", "nothing"),
            Package("no-such-other", "nothing", optional=True),
        ),
    )
    seen = by_check(doctor.packages("cpu"))
    assert {check: finding.state for check, finding in seen.items()} == {
        "python": "ok",
        "torch": "ok",
        "numpy": "wrong",
        "no-such-thing": "wrong",
        "no-such-other": "note",
    }
    assert seen["numpy"].advice == "known good is 0.0.1 (arrays): pip install 'numpy==0.0.1'"


def test_a_version_that_differs_from_the_set_for_gpus_is_noted(monkeypatch):
    monkeypatch.setattr(
        doctor,
        "PACKAGES",
        (
            Package("numpy", "arrays", on_gpu="0.0.1"),
            Package("torch", "tensors", least="99", on_gpu="99.1"),
            Package("scipy", "x", "gpu"),
        ),
    )
    on_gpu, on_cpu = by_check(doctor.packages("gpu")), by_check(doctor.packages("cpu"))
    assert on_gpu["numpy"].state == "note" and on_gpu["numpy"].advice.endswith("pip install 'numpy==0.0.1'")
    assert (
        on_gpu["torch"].state == on_cpu["torch"].state == "wrong"
        and on_gpu["scipy"].state == "ok" == on_cpu["numpy"].state
    )


def test_setup_installs_the_known_good_versions():
    setup, script = (ROOT / "pyproject.toml").read_text(), (ROOT / "launch" / "setup.sh").read_text()
    pins = dict(re.findall(r'"([a-z-]+)(?:\[[^]]+\])?==([^"]+)"', setup))
    for package in doctor.PACKAGES:
        if package.on_gpu:
            assert pins[package.name] == package.on_gpu
    assert f"\npythons=({' '.join(f'{major}.{minor}' for major, minor in doctor.PYTHONS)})\n" in script
    classifiers = re.findall(r"Programming Language :: Python :: 3\.(\d+)", setup)
    assert [(3, int(minor)) for minor in classifiers] == list(doctor.PYTHONS)
    assert f'requires-python = ">=3.{classifiers[0]},<3.{int(classifiers[-1]) + 1}"' in setup
    for package in doctor.PACKAGES:
        if package.exactly:
            assert f'"{package.name}=={package.exactly}"' in setup
        elif package.least:
            assert f'"{package.name}>={package.least}' in setup


@pytest.mark.parametrize(
    ("variables", "check", "state", "advice"),
    [
        ({"OMP_NUM_THREADS": "64", "LOCAL_WORLD_SIZE": "2"}, "threads", "wrong", "OMP_NUM_THREADS="),
        ({"OMP_NUM_THREADS": "1", "LOCAL_WORLD_SIZE": "1"}, "threads", "ok", ""),
        ({"VLLM_ENABLE_V1_MULTIPROCESSING": "1"}, "VLLM_ENABLE_V1_MULTIPROCESSING", "wrong", "unset it"),
    ],
)
def test_environment_variables(monkeypatch, variables, check, state, advice):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    finding = by_check(doctor.environment("cpu"))[check]
    assert finding.state == state and advice in finding.advice


def test_a_package_that_does_not_import(monkeypatch):
    monkeypatch.setattr(doctor, "IMPORTS", ("json", "no_such_module"))
    seen = by_check(doctor.imports())
    assert seen["import json"].state == "ok" and seen["import no_such_module"].state == "wrong"
    assert "No module named 'no_such_module'" in seen["import no_such_module"].result


def test_a_folder_that_cannot_be_written(tmp_path):
    assert by_check(doctor.machine(tmp_path))[f"folder {tmp_path}"].state in ("ok", "note")
    assert by_check(doctor.machine(tmp_path / "absent"))[f"folder {tmp_path / 'absent'}"].state == "wrong"


def test_ranks_that_differ_are_named():
    same, slow, bad = Finding("a", "1 GB/s"), Finding("a", "0.5 GB/s"), Finding("b", "missing", "wrong", "install")
    assert combined([[same], [same]]) == [same]
    assert combined([[same], [slow], [same]]) == [Finding("a", "0.5 GB/s to 1 GB/s over the ranks")]
    assert combined([[Finding("b", "1.0")], [bad], [bad]])[1] == Finding("b", "missing (rank 1, 2)", "wrong", "install")


def test_the_table_of_the_gpu_page_is_the_known_good_one():
    page = (ROOT / "docs" / "gpu.md").read_text()
    rows = dict(
        re.findall(r"^\| ([\w .-]+) \| ([\w. ]+)(?: or later)?(?:;[^|]*)? \|", page.split("## Installing")[0], re.M)
    )
    for package in doctor.PACKAGES:
        if package.on_gpu or package.name == "megatron-core":
            assert rows[package.name] == (package.exactly or package.on_gpu)
    assert rows["CUDA toolkit"] == doctor.CUDA


def _doctor(folder):
    import contextlib
    import io

    out = io.StringIO()
    with contextlib.redirect_stdout(out), pytest.MonkeyPatch.context() as patch:
        patch.setattr(doctor, "IMPORTS", ())
        try:
            status = main(["doctor", f"--folder={folder}"])
        except SystemExit as end:
            status = end.code
    return status, out.getvalue()


def test_two_ranks_measure_the_interconnect(ranks, tmp_path):
    (status, text), (other, silent) = ranks.run(_doctor, tmp_path, world=2)
    assert status == other and silent == ""
    assert re.search(r"all-reduce over 2 ranks +[\d.e-]+ GB/s \(gloo\)", text) and re.search(
        r"matrix product, float32 +[\d.e-]+", text
    )
    assert ("ready to train" in text) == (status == 0)


def test_the_gpu_page_lists_every_file_with_a_gpu_branch():
    branching = {
        str(path.relative_to(ROOT)) for path in (ROOT / "pctrain").rglob("*.py") if "on_gpu()" in path.read_text()
    }
    branching -= {"pctrain/common/device.py", "pctrain/tools/doctor.py"}  # the check itself, and a reader of figures
    table = (ROOT / "docs" / "gpu.md").read_text().split("## What differs on a GPU")[1].split("\n## ")[0]
    listed = set(re.findall(r"`((?:pctrain|kernels)/[\w/]+\.py)`", table))
    assert {file for file in listed if file.startswith("pctrain/")} == branching
    assert all((ROOT / file).exists() for file in listed)
