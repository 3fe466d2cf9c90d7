"""launch/Dockerfile without Docker: its instructions, pins, copied files and shell steps, and the page's commands."""

import fnmatch
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from pctrain.tools import doctor
from tests.helpers.doc_pages import commands

ROOT = Path(__file__).resolve().parents[2]
FILE = ROOT / "launch" / "Dockerfile"
WORDS = ("ARG", "FROM", "RUN", "USER", "WORKDIR", "ENV", "COPY", "CMD")  # not ADD: it may download


def parse() -> list[tuple[str, str]]:
    """Return (instruction, arguments) of each line, without comments and with continued lines joined."""
    text = re.sub(r"^\s*#.*\n", "", FILE.read_text(), flags=re.M)
    lines = [line for line in re.sub(r"\\\n", " ", text).splitlines() if line.strip()]
    return [(line.split(" ", 1)[0], line.split(" ", 1)[1].strip()) for line in lines]


STEPS = parse()
RUNS = [arguments for word, arguments in STEPS if word == "RUN"]


def stages() -> dict[str, list[tuple[str, str]]]:
    found: dict[str, list[tuple[str, str]]] = {}
    for word, arguments in STEPS:
        if word == "FROM":
            found[arguments.split(" AS ")[1]] = []
        if found:
            found[list(found)[-1]].append((word, arguments))
    return found


def ignored(path: str) -> bool:
    """Apply .dockerignore: the last matching pattern decides, and `!` re-includes."""
    state = False
    for line in (ROOT / ".dockerignore").read_text().splitlines():
        pattern = line.strip().lstrip("!")
        if not pattern or line.startswith("#"):
            continue
        parts = [part for part in [path, *map(str, Path(path).parents)] if part != "."]
        if pattern.startswith("**/"):
            parts, pattern = [Path(part).name for part in parts], pattern[3:]
        if any(fnmatch.fnmatch(part, pattern) for part in parts):
            state = not line.startswith("!")
    return state


def test_every_line_is_an_instruction_that_is_known():
    assert {word for word, _ in STEPS} <= set(WORDS) and len(RUNS) >= 7
    assert list(stages()) == ["cpu", "gpu"]


def test_bases_are_pinned_as_the_doctor_knows_them():
    arguments = dict(pair.split("=") for word, pair in STEPS if word == "ARG")
    assert arguments["CUDA"] == doctor.CUDA and re.fullmatch(r"3\.12\.\d+", arguments["PYTHON"])
    assert (3, 12) in doctor.PYTHONS
    bases = [text.split(" AS ")[0] for word, text in STEPS if word == "FROM"]
    # Without cuDNN and with Python 3.12, which both images have.
    assert bases == ["python:${PYTHON}-slim-bookworm", "nvidia/cuda:${CUDA}-devel-ubuntu24.04"]
    assert not re.search(r"==\d", FILE.read_text())  # package versions are in pyproject.toml and setup.sh only


def gpu_environment() -> dict[str, str]:
    return dict(pair.split("=", 1) for word, text in stages()["gpu"] if word == "ENV" for pair in text.split())


def test_transformer_engine_finds_the_cudnn_of_torch():
    """CUDNN_PATH is where pip puts it, and the build stops if it is not there or if the system has another one."""
    folder = gpu_environment()["CUDNN_PATH"]
    assert folder == "/opt/pctrain/.venv/lib/python3.12/site-packages/nvidia/cudnn"
    assert gpu_environment()["LD_LIBRARY_PATH"] == "$CUDNN_PATH/lib:$LD_LIBRARY_PATH"
    assert "cudnn" not in " ".join(text for word, text in stages()["gpu"][:2])  # the base and the system's packages
    names = [text for word, text in stages()["gpu"] if word == "RUN"]
    assert "test -e $CUDNN_PATH/lib/libcudnn.so.9 && ! ldconfig -p | grep libcudnn" in names


@pytest.mark.parametrize(("files", "system", "status"), [(True, "", 0), (False, "", 1), (True, "libcudnn.so.9", 1)])
def test_the_step_that_looks_for_two_cudnns(tmp_path, files, system, status):
    step = next(text for word, text in stages()["gpu"] if "ldconfig" in text)
    (tmp_path / "lib").mkdir()
    if files:
        (tmp_path / "lib" / "libcudnn.so.9").touch()
    (tmp_path / "ldconfig").write_text(f"#!/bin/sh\necho 'libc.so.6'; echo '{system}'\n")
    (tmp_path / "ldconfig").chmod(0o755)
    environment = {"PATH": f"{tmp_path}:/usr/bin:/bin", "CUDNN_PATH": str(tmp_path)}
    assert subprocess.run(["sh", "-c", step], env=environment, capture_output=True).returncode == status


def test_flash_attn_is_compiled_where_asked_only():
    arguments = [text for word, text in stages()["gpu"] if word == "ARG"]
    assert arguments == ["FLASH_ATTN=0"] and gpu_environment()["PCTRAIN_FLASH_ATTN"] == "$FLASH_ATTN"


@pytest.mark.parametrize("step", RUNS, ids=range(len(RUNS)))
def test_the_shell_of_every_step_parses(step):
    subprocess.run(["bash", "-n", "-c", step], check=True)
    assert not re.search(r"\b(curl|wget)\b|git clone|http", step)
    for program in re.findall(r'python[\d.]* -c "(.+)"', step):
        compile(program, "RUN", "exec")


@pytest.mark.parametrize("target", ["cpu", "gpu"])
def test_a_target_installs_as_anywhere_else_and_runs_as_a_user(target):
    steps = stages()[target]
    names = [word for word, _ in steps]
    user = names.index("USER")
    assert steps[user][1] == "pctrain" and "useradd" in " ".join(text for word, text in steps[:user] if word == "RUN")
    later = [text for word, text in steps[user:] if word == "RUN"]
    assert later[0] == "bash launch/setup.sh" and f"packages('{target}')" in later[-1]
    environment = " ".join(text for word, text in steps if word == "ENV")
    assert f"PCTRAIN_DEVICE={target}" in environment and "/opt/pctrain/.venv/bin:$PATH" in environment
    assert json.loads(dict(steps)["CMD"]) == ["pctrain", "doctor"]


def test_copied_files_exist_and_reach_the_builder():
    copied = [text.split() for word, text in STEPS if word == "COPY"]
    sources = {
        source
        for words in copied
        if not any(w.startswith("--from") for w in words)
        for source in [w for w in words if not w.startswith("--")][:-1]
    }
    assert {"setup.py", "launch/setup.sh", "launch/constraints-gpu.txt", "."} <= sources
    for source in sources - {"."}:
        assert (ROOT / source).exists() and not ignored(source)
    for path in (
        "pctrain/cli/main.py",
        "configs/quickstart.yaml",
        "launch/torchrun.sh",
        "kernels/pctrain_kernels/backend.py",
        "README.md",
    ):
        assert (ROOT / path).exists() and not ignored(path)
    assert all(
        ignored(path)
        for path in (".venv/bin/python", "runs/quickstart/sft", ".git/config", "pctrain/__pycache__/a.pyc")
    )


def test_the_environments_files_are_copied_before_the_code():
    """The files that setup.sh and the packaging read in that step suffice to build the package."""
    steps = stages()["cpu"]
    install = steps.index(("RUN", "bash launch/setup.sh"))
    early = [text for word, text in steps[:install] if word == "COPY"]
    assert ("COPY", "--chown=pctrain . .") in steps[install:]
    assert early == [text for word, text in stages()["gpu"] if word == "COPY" and "--chown" in text][:-1]


@pytest.mark.full
def test_the_package_builds_from_the_files_that_are_copied_first(tmp_path):
    for words in (text.split() for word, text in stages()["cpu"] if word == "COPY" and text != "--chown=pctrain . ."):
        *sources, target = [word for word in words if not word.startswith("--")]
        for source in sources:
            to = tmp_path / "checkout" / (target + Path(source).name if target.endswith("/") else target)
            to.parent.mkdir(parents=True, exist_ok=True)
            (shutil.copytree if (ROOT / source).is_dir() else shutil.copy)(ROOT / source, to)
    offline = ["--no-deps", "--no-index", "--no-build-isolation"]
    install = [
        sys.executable,
        "-m",
        "pip",
        "install",
        *offline,
        "--target",
        str(tmp_path / "there"),
        "-e",
        str(tmp_path / "checkout"),
    ]
    done = subprocess.run(install, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-2000:]
    # The code is copied later.
    shutil.copytree(ROOT / "pctrain" / "common", tmp_path / "checkout" / "pctrain" / "common")
    program = (
        f"import site; site.addsitedir({str(tmp_path / 'there')!r}); "
        "import pctrain.common.errors as e; import importlib.util as u; "
        "print(e.__file__, u.find_spec('pctrain_kernels').origin)"
    )
    seen = subprocess.run(
        [sys.executable, "-S", "-c", program],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        timeout=100,
        env={"PATH": "/usr/bin"},
    )
    assert seen.stdout.count(str(tmp_path / "checkout")) == 2, seen.stderr


def test_the_commands_of_the_page():
    shown = [shown for shown in commands(ROOT / "docs" / "gpu.md") if shown.words[0] == "docker"]
    tags = {}
    for command in shown:
        words = list(command.words)
        if words[1] == "build":
            assert (ROOT / words[words.index("--file") + 1]) == FILE and words[words.index("--target") + 1] in stages()
            tags[words[words.index("--tag") + 1]] = words[words.index("--target") + 1]
        else:
            at = next(i for i, word in enumerate(words) if word in tags)
            inside = [word for word in words[at + 1 :] if word != "bash"]
            assert not inside or (ROOT / inside[0]).exists()
    assert set(tags.values()) == {"cpu", "gpu"} and len(shown) == 5
