"""`pctrain doctor`: its findings and advice; and docs/gpu.md, which lists every file with a GPU branch."""

import contextlib
import importlib.metadata
import io
import os
import platform
import re
import subprocess
import sys
from pathlib import Path
from unittest.mock import create_autospec

import pytest
import torch

from pctrain.cli.main import main
from pctrain.distributed import parallel
from pctrain.tools import doctor
from pctrain.tools.doctor import Finding, Package, combined, gpus, libraries, versions
from tests.helpers import fake_gpus

ROOT = Path(__file__).resolve().parents[2]


def by_check(findings):
    return {finding.check: finding for finding in findings}


def test_versions_are_compared_with_the_known_good_ones(monkeypatch):
    monkeypatch.setattr(
        versions,
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
        versions,
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
    monkeypatch.setattr(libraries, "IMPORTS", ("json", "no_such_module"))
    monkeypatch.setattr(libraries, "NEEDED", ("json",))  # without vLLM, the ranks are still connected and measured
    seen = by_check(doctor.imports())
    assert seen["import json"].state == "ok" and seen["import no_such_module"].state == "wrong"
    assert "No module named 'no_such_module'" in seen["import no_such_module"].result
    assert not seen["import no_such_module"].stops
    monkeypatch.setattr(libraries, "NEEDED", ("no_such_module",))
    assert by_check(doctor.imports())["import no_such_module"].stops


def test_a_folder_that_cannot_be_written(tmp_path):
    assert by_check(doctor.machine(tmp_path))[f"folder {tmp_path}"].state in ("ok", "note")
    assert by_check(doctor.machine(tmp_path / "absent"))[f"folder {tmp_path / 'absent'}"].state == "wrong"


def test_ranks_that_differ_are_named():
    same, slow, bad = Finding("a", "1 GB/s"), Finding("a", "0.5 GB/s"), Finding("b", "missing", "wrong", "install")
    assert combined([[same], [same]]) == [same]
    assert combined([[same], [slow], [same]]) == [Finding("a", "0.5 GB/s to 1 GB/s over the ranks")]
    assert combined([[Finding("b", "1.0")], [bad], [bad]])[1] == Finding("b", "missing (rank 1, 2)", "wrong", "install")


def test_results_that_must_agree_or_differ():
    new, old = Finding("torch", "2.13.0", across="same"), Finding("torch", "2.11.0", across="same")
    assert combined([[new], [new]], ["a", "b"]) == [new]
    [mixed] = combined([[new], [old], [new], [old]], ["a", "b", "a", "b"])
    assert (mixed.result, mixed.state) == ("2.13.0 on a (rank 0, 2); 2.11.0 on b (rank 1, 3)", "wrong") and mixed.stops
    absent = Finding("vllm", "not installed", "wrong", "install it", across="same")
    [mixed] = combined([[absent], [Finding("vllm", "0.32.0", across="same")]], ["a", "b"])
    assert mixed.result == "not installed on a (rank 0); 0.32.0 on b (rank 1)" and mixed.advice.endswith("install it")
    gpus_of_ranks = [Finding("GPU", uuid, across="distinct") for uuid in ("x", "y", "x")]
    [shared] = combined([[finding] for finding in gpus_of_ranks], ["a", "a", "b"])
    assert (shared.result, shared.state) == ("x belongs to a, b (rank 0, 2)", "wrong")


def test_the_table_of_the_gpu_page_is_the_known_good_one():
    page = (ROOT / "docs" / "gpu.md").read_text()
    rows = dict(
        re.findall(r"^\| ([\w .-]+) \| ([\w. ]+)(?: or later)?(?:;[^|]*)? \|", page.split("## Installing")[0], re.M)
    )
    for package in doctor.PACKAGES:
        if package.on_gpu or package.name == "megatron-core":
            assert rows[package.name] == (package.exactly or package.on_gpu)
    assert rows["CUDA toolkit"] == doctor.CUDA


def _doctor(folder, prepare=lambda patch, folder, rank: None):
    """Return (exit status, output) of `pctrain doctor` on a rank, after `prepare` made its machine."""
    rank = int(os.environ["RANK"])
    out = io.StringIO()
    with contextlib.redirect_stdout(out), pytest.MonkeyPatch.context() as patch:
        patch.setattr(libraries, "IMPORTS", ())
        prepare(patch, folder / f"rank{rank}", rank)
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


def _other_versions(patch, folder, rank):
    real = importlib.metadata.version
    older = {"torch": "2.11.0", "megatron-core": "0.16.0"}
    if rank == 1:
        patch.setattr(importlib.metadata, "version", lambda name: older.get(name) or real(name))
    patch.setattr(platform, "node", lambda: f"node{rank}")


def test_nodes_with_mixed_versions(ranks, tmp_path):
    (status, text), (other, silent) = ranks.run(_doctor, tmp_path, _other_versions, world=2)
    assert (status, other, silent) == (1, 1, "")
    here = importlib.metadata.version("torch")
    assert f"WRONG: torch, {here} on node0 (rank 0); 2.11.0 on node1 (rank 1): all ranks need the same: use one" in text
    assert "WRONG: megatron-core, 0.16.1 on node0 (rank 0); 0.16.0 on node1 (rank 1): all ranks" in text
    assert "known good is 0.16.1" in text  # the advice of the one that is wrong by itself
    assert "note: rates, not measured: fix what is wrong" in text and "all-reduce" not in text


def _one_gpu_for_two(patch, folder, rank):
    patch.setattr(gpus, "_installed", lambda package: package == "vllm")
    fake_gpus.nvidia_smi(patch, folder, gpus=[fake_gpus.gpu(0)])
    patch.setenv("LOCAL_RANK", "0")
    fake_gpus.cuda(patch, [fake_gpus.properties(0)])


def test_two_ranks_on_one_gpu_do_not_wait_for_each_other(ranks, tmp_path):
    (status, text), (other, _) = ranks.run(_doctor, tmp_path, _one_gpu_for_two, world=2)
    assert status == other == 1
    assert re.search(r"WRONG: GPU of the rank, GPU-00000000-\S+ belongs to \S+ \(rank 0, 1\): NCCL refuses", text)
    assert "note: rates, not measured" in text


def _old_driver_on_one_node(patch, folder, rank):
    patch.setattr(gpus, "_installed", lambda package: package == "vllm")
    patch.setattr(platform, "node", lambda: f"node{rank}")
    patch.setenv("LOCAL_RANK", "0")
    if rank == 0:
        fake_gpus.nvidia_smi(patch, folder, gpus=[fake_gpus.gpu(0)])
        fake_gpus.cuda(patch, [fake_gpus.properties(0)])
    else:
        fake_gpus.nvidia_smi(patch, folder, gpus=[fake_gpus.gpu(1, driver_version="570.86.15")])
        fake_gpus.cuda(patch, error="The NVIDIA driver on your system is too old")


def test_a_driver_that_is_too_old_on_one_node(ranks, tmp_path):
    """The old node would take gloo and the other one NCCL, and both would wait."""
    (status, text), (other, _) = ranks.run(_doctor, tmp_path, _old_driver_on_one_node, world=2)
    assert status == other == 1
    assert "WRONG: NVIDIA driver, 580.105.08 on node0 (rank 0); 570.86.15 on node1 (rank 1): all ranks" in text
    assert "which needs driver 580.65.06 or later" in text and "note: rates, not measured" in text


def test_the_environment_of_a_run_is_set_before_cuda_starts(monkeypatch, tmp_path):
    found = []

    def look() -> None:
        found.append(os.environ.get("CUDA_DEVICE_MAX_CONNECTIONS"))
        raise RuntimeError("no driver")

    fake_gpus.nvidia_smi(monkeypatch, tmp_path / "bin", gpus=[fake_gpus.gpu(0)])
    fake_gpus.cuda(monkeypatch)
    monkeypatch.setattr(torch.cuda, "init", look)
    monkeypatch.setattr(libraries, "IMPORTS", ())
    monkeypatch.setattr(os, "environ", {"PATH": os.environ["PATH"]})
    assert doctor.main(tmp_path) == 1
    assert found == ["1"]


def test_an_error_while_the_ranks_connect_is_a_finding(monkeypatch, tmp_path, capsys):
    def refuse(config, seed):
        raise RuntimeError("ncclInvalidUsage: Duplicate GPU detected :\nrank 0 and rank 1 both on CUDA device 53000")

    monkeypatch.setattr(libraries, "IMPORTS", ())
    monkeypatch.setattr(parallel, "initialize", create_autospec(parallel.initialize, side_effect=refuse))
    assert doctor.main(tmp_path) == 1
    output = " ".join(capsys.readouterr().out.split())
    assert "WRONG: rates, RuntimeError: ncclInvalidUsage: Duplicate GPU detected : rank 0 and rank 1" in output
    assert "NCCL_DEBUG=INFO" in output and "megatron-core" in output  # the other findings are printed too


@pytest.mark.timeout(240)
def test_ranks_of_torchrun_tell_each_other_before_they_connect(tmp_path):
    """The exchange uses the store of torchrun, and the process group does so after it."""
    program = tmp_path / "program.py"
    program.write_text(
        "import os, platform, sys\nfrom pathlib import Path\n"
        "from pctrain.tools.doctor import libraries, main\nfrom pctrain.tools.doctor.ranks import exchange\n"
        "libraries.IMPORTS = ()\nrank = int(os.environ['RANK'])\n"
        "assert exchange({'rank': rank}) == [{'rank': 0}, {'rank': 1}]\n"
        f"platform.node = lambda: f'node{{rank}}'\nsys.exit(main(Path({str(tmp_path)!r})))\n"
    )
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(program)]
    root = {"PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}:{os.environ.get('PYTHONPATH', '')}"}
    done = subprocess.run(torchrun, capture_output=True, text=True, timeout=200, env=os.environ | root)
    assert re.search(r"all-reduce over 2 ranks +[\d.e-]+ GB/s \(gloo\)", done.stdout), done.stdout + done.stderr
    assert "not measured" not in done.stdout


def test_the_gpu_page_lists_every_file_with_a_gpu_branch():
    branching = {
        str(path.relative_to(ROOT)) for path in (ROOT / "pctrain").rglob("*.py") if "on_gpu()" in path.read_text()
    }
    branching -= {
        "pctrain/common/device.py",
        "pctrain/tools/doctor/command.py",
    }  # the check, a reader
    table = (ROOT / "docs" / "gpu.md").read_text().split("## What differs on a GPU")[1].split("\n## ")[0]
    listed = set(re.findall(r"`((?:pctrain|kernels)/[\w/]+\.py)`", table))
    assert {file for file in listed if file.startswith("pctrain/")} == branching
    assert all((ROOT / file).exists() for file in listed)
