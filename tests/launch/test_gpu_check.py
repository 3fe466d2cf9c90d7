"""`launch/gpu_check.py` on a CPU, as a program in a fresh environment: it starts, passes, fails and skips."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SECONDS = 900  # for a busy machine
ALL_SECONDS = 3000  # for all phases, which take 4 minutes on an idle one


def check(
    script: Path, folder: Path, *arguments: str, path: str = "", seconds: float = SECONDS
) -> subprocess.CompletedProcess[str]:
    """Run the script from another folder, without this checkout on PYTHONPATH."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    if path:
        environment["PYTHONPATH"] = path
    return subprocess.run(
        [sys.executable, str(script), *arguments],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=seconds,
    )


def phases(folder: Path) -> dict[str, str]:
    rows = [json.loads(line) for line in (folder / "gpu-check" / "results.jsonl").read_text().splitlines()]
    return {row["phase"]: row["status"] for row in rows if row["kind"] == "phase"}


def scratch_folders() -> set[Path]:
    return set(Path(os.environ.get("TMPDIR", "/tmp")).glob("gpu-check-*"))


@pytest.mark.timeout(SECONDS)
def test_a_quick_check_without_a_gpu(tmp_path):
    before = scratch_folders()
    chosen = "environment,rates,kernels,sanitizer,learner,memory"
    done = check(ROOT / "launch" / "gpu_check.py", tmp_path, "--cpu", "--quick", "--phases", chosen)
    assert done.returncode == 0, done.stdout + done.stderr
    assert phases(tmp_path) == {name: "SKIP" if name == "sanitizer" else "pass" for name in chosen.split(",")}
    assert "5 passed, 0 failed, 1 skipped" in done.stdout
    assert re.search(r"^pass +kernels +[\d.]+ +26/26$", done.stdout, re.M)
    assert not scratch_folders() - before
    printed = check(ROOT / "launch" / "gpu_check.py", tmp_path, "--compare", "gpu-check/results.jsonl").stdout
    assert re.search(r"^\| Triton kernels of pctrain_kernels \| run on a CPU only \(", printed, re.M)


@pytest.mark.full
@pytest.mark.timeout(ALL_SECONDS)
def test_every_phase_without_a_gpu(tmp_path):
    done = check(ROOT / "launch" / "gpu_check.py", tmp_path, "--cpu", seconds=ALL_SECONDS)
    assert done.returncode == 0, done.stdout + done.stderr
    seen = phases(tmp_path)
    assert {name for name, status in seen.items() if status == "SKIP"} == {"sanitizer", "transformer_engine"}
    assert len(seen) == 13


@pytest.mark.timeout(SECONDS)
def test_without_a_gpu_it_fails_and_names_the_way_out(tmp_path):
    done = check(ROOT / "launch" / "gpu_check.py", tmp_path, "--phases", "rates")
    assert done.returncode == 1 and phases(tmp_path) == {"rates": "FAIL"}
    assert "sees no CUDA device. Expected a GPU and its driver" in done.stdout and "--cpu" in done.stdout


@pytest.fixture(scope="module")
def copy_of_the_tree(tmp_path_factory):
    """Copy what the script needs, to be broken."""
    root = tmp_path_factory.mktemp("tree")
    for name in ("pctrain", "kernels/pctrain_kernels"):
        shutil.copytree(ROOT / name, root / name, ignore=shutil.ignore_patterns("__pycache__"))
    (root / "launch").mkdir()
    shutil.copy(ROOT / "launch" / "gpu_check.py", root / "launch")
    return root


BREAKS = {
    "sums the target's term twice": ("counted = inside & (index != target)", "counted = inside", "logprob"),
    "reads memory that nobody wrote": (
        'tl.store(out_rest + row, tl.where(maximum == -float("inf"), float("nan"), total))',
        "tl.store(out_rest + row, total, mask=row != 3)",
        "same bits in poisoned memory",
    ),
}


@pytest.mark.timeout(SECONDS)
@pytest.mark.parametrize("name", BREAKS)
def test_a_broken_kernel_fails_the_check(copy_of_the_tree, tmp_path, name):
    right, wrong, point = BREAKS[name]
    kernel = copy_of_the_tree / "kernels" / "pctrain_kernels" / "triton_softmax.py"
    text = kernel.read_text()
    assert right in text
    kernel.write_text(text.replace(right, wrong))
    try:
        done = check(copy_of_the_tree / "launch" / "gpu_check.py", tmp_path, "--cpu", "--quick", "--phases", "kernels")
    finally:
        kernel.write_text(text)
    assert done.returncode == 1 and phases(tmp_path) == {"kernels": "FAIL"}, done.stdout
    assert re.search(rf"^FAIL: kernels: .*{point}", done.stdout, re.M), done.stdout


BARE = """
import importlib.abc, sys

class Absent(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name.split(".")[0] in {names}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Absent())
"""


@pytest.mark.timeout(SECONDS)
def test_with_torch_and_triton_alone_the_rest_is_skipped_by_name(tmp_path):
    absent = {
        "megatron",
        "pydantic",
        "einops",
        "vllm",
        "rich",
        "packaging",
        "transformer_engine",
        "matplotlib",
        "scipy",
    }
    (tmp_path / "sitecustomize.py").write_text(BARE.format(names=absent))
    chosen = "environment,rates,kernels,resume,te,vllm"
    script = ROOT / "launch" / "gpu_check.py"
    done = check(script, tmp_path, "--cpu", "--quick", "--phases", chosen, path=str(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
    assert phases(tmp_path) == {
        "environment": "pass",
        "rates": "pass",
        "kernels": "pass",
        "resume": "SKIP",
        "transformer_engine": "SKIP",
        "engine": "SKIP",
    }
    assert "needs the pinned set: megatron-core is not installed" in done.stdout
