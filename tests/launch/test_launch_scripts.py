"""launch/torchrun.sh and launch/slurm.sbatch: the commands and the environment they make, and what they refuse."""

import mmap
import os
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from torch.distributed.run import get_args_parser

from tests.helpers.shell import executable, script

ROOT = Path(__file__).resolve().parents[2]
TORCHRUN, SBATCH = ROOT / "launch" / "torchrun.sh", ROOT / "launch" / "slurm.sbatch"

# The options in torch/distributed/run.py of torch 2.11.0, with which launch/torchrun.sh works as well.
OPTIONS_OF_OLD_TORCH = {
    *("--nnodes", "--nproc-per-node", "--rdzv-backend", "--rdzv-endpoint", "--rdzv-id", "--rdzv-conf", "--standalone"),
    *("--max-restarts", "--monitor-interval", "--start-method", "--event-log-handler", "--role", "--module"),
    *("--no-python", "--run-path", "--log-dir", "--redirects", "--tee", "--local-ranks-filter"),
    *("--duplicate-stdout-filters", "--duplicate-stderr-filters", "--node-rank", "--master-addr", "--master-port"),
    *("--local-addr", "--logs-specs", "--numa-binding", "--signals-to-handle", "--virtual-local-rank"),
}


def fake_venv(folder, torch_folder):
    """Return variables for a Python that has the torch of a folder, and prints how it is called."""
    executable(folder / "venv/bin/python", f'if [[ "$1" = -c ]]; then echo {torch_folder}; else echo "$@"; env; fi')
    executable(folder / "bin/nvidia-smi", "exit 1")
    return {"PCTRAIN_VENV": str(folder / "venv"), "PATH": f"{folder / 'bin'}:{os.environ['PATH']}"}


@pytest.fixture
def venv(tmp_path):
    """Return an environment with the installed torch, whose Python prints how it is called and its environment."""
    return fake_venv(tmp_path, Path(torch.__file__).parent)


def command(output):
    """Return the first line of what the fake Python prints: how it is called."""
    return output.splitlines()[0]


def test_one_node(venv, tmp_path):
    status, output = script(TORCHRUN, "sft", "--config", "a b.yaml", **venv)
    assert (status, command(output)) == (
        0,
        "-m torch.distributed.run --standalone --nproc-per-node 1 --max-restarts 3 --shutdown-timeout 600 "
        "-m pctrain sft --config a b.yaml",
    )
    executable(tmp_path / "bin/nvidia-smi", "printf 'GPU 0\\nGPU 1\\n'")
    assert "--nproc-per-node 2 " in script(TORCHRUN, "rl", **venv)[1]
    assert "--nproc-per-node 1 --max-restarts 0" in script(TORCHRUN, "rl", NPROC="1", MAX_RESTARTS="0", **venv)[1]
    assert "--max-restarts 0 " in script(TORCHRUN, "doctor", **venv)[1]  # its findings do not change by a restart


@pytest.mark.parametrize(
    ("visible", "ranks"), [("2,3,5", 3), ("0", 1), ("", 1), ("GPU-8c7c9c30-f12f,GPU-7f57f032-34ab", 2)]
)
def test_one_rank_per_visible_gpu(venv, tmp_path, visible, ranks):
    executable(tmp_path / "bin/nvidia-smi", "printf 'GPU 0\\nGPU 1\\nGPU 2\\nGPU 3\\n'")
    assert f"--nproc-per-node {ranks} " in script(TORCHRUN, "rl", CUDA_VISIBLE_DEVICES=visible, **venv)[1]


def test_mig_slices_are_not_counted_as_gpus(venv, tmp_path):
    listing = "GPU 0: NVIDIA H100 80GB HBM3 (UUID: GPU-7f57f032)\\n  MIG 2g.20gb     Device  0: (UUID: MIG-377e0049)\\n"
    executable(tmp_path / "bin/nvidia-smi", f"printf '{listing}  MIG 1g.10gb     Device  1: (UUID: MIG-f39aa248)\\n'")
    assert "--nproc-per-node 1 " in script(TORCHRUN, "rl", **venv)[1]


SEVERAL_NODES = {"NNODES": "2:4", "RDZV": "node1:29500", "RDZV_ID": "run7", "LOCAL_ADDR": "node1", "NPROC": "8"}


def test_the_installed_torchrun_takes_every_option(venv):
    given = command(
        script(TORCHRUN, "rl", "--run.seed=1", NUMA_BINDING="node", STOP_SECONDS="7", **SEVERAL_NODES, **venv)[1]
    )
    options = get_args_parser().parse_args(shlex.split(given)[2:])
    assert (options.nnodes, options.nproc_per_node, options.rdzv_endpoint) == ("2:4", "8", "node1:29500")
    assert (options.max_restarts, options.shutdown_timeout, options.numa_binding) == (3, 7, "node")
    assert options.module and options.training_script == "pctrain"
    assert options.training_script_args == ["rl", "--run.seed=1"]


def old_torchrun(folder, options):
    """Make the part of a torch that launch/torchrun.sh reads: a run.py with these options."""
    (folder / "torch/distributed").mkdir(parents=True)
    lines = "".join(f'    parser.add_argument(\n        "{option}",\n    )\n' for option in sorted(options))
    (folder / "torch/distributed/run.py").write_text(f"def get_args_parser():\n{lines}")
    return fake_venv(folder, folder / "torch")


def test_an_older_torchrun_takes_every_option(tmp_path):
    environment = old_torchrun(tmp_path, OPTIONS_OF_OLD_TORCH)
    status, output = script(TORCHRUN, "rl", NUMA_BINDING="node", **SEVERAL_NODES, **environment)
    given, warning = command(output), output.splitlines()[-1]
    before_the_module = given.partition(" -m pctrain ")[0].removeprefix("-m torch.distributed.run ")
    assert status == 0 and set(re.findall(r"--[a-z-]+", before_the_module)) <= OPTIONS_OF_OLD_TORCH
    assert "has no --shutdown-timeout: after SIGTERM ranks have 30 s to save, not 600" in warning
    of_the_new_one = {option for action in get_args_parser()._actions for option in action.option_strings}
    assert of_the_new_one - OPTIONS_OF_OLD_TORCH and not OPTIONS_OF_OLD_TORCH - of_the_new_one


def test_numa_binding_of_a_torchrun_without_it(tmp_path):
    environment = old_torchrun(tmp_path, OPTIONS_OF_OLD_TORCH - {"--numa-binding"})
    status, output = script(TORCHRUN, "rl", NUMA_BINDING="node", **environment)
    assert status == 2 and "has no --numa-binding (2.9 and later have it): unset it" in output


DEFAULTS = {"CUDA_DEVICE_ORDER": "PCI_BUS_ID", "NCCL_DEBUG": "WARN"}
OF_SEVERAL_NODES = {"NCCL_IB_TIMEOUT": "22", "GLOO_SOCKET_IFNAME": "lo"}


def variables(output):
    return dict(line.split("=", 1) for line in output.splitlines()[1:] if "=" in line)


def test_defaults_of_the_environment(venv, tmp_path):
    names = [*DEFAULTS, *OF_SEVERAL_NODES]
    seen = variables(script(TORCHRUN, "rl", NCCL_SOCKET_IFNAME="lo", **venv)[1])
    assert {name: seen[name] for name in names if name in seen} == DEFAULTS
    seen = variables(script(TORCHRUN, "rl", NCCL_SOCKET_IFNAME="=lo", **SEVERAL_NODES, **venv)[1])
    assert {name: seen[name] for name in names} == DEFAULTS | OF_SEVERAL_NODES
    for prefix in ("no-such", "^lo", ""):  # NCCL takes prefixes and lists, gloo does not
        seen = variables(script(TORCHRUN, "rl", NCCL_SOCKET_IFNAME=prefix, **SEVERAL_NODES, **venv)[1])
        assert "GLOO_SOCKET_IFNAME" not in seen


def test_own_values_and_those_of_nccls_files_win(venv, tmp_path):
    own = {"NCCL_DEBUG": "INFO", "NCCL_IB_TIMEOUT": "", "GLOO_SOCKET_IFNAME": "eth7"}
    seen = variables(script(TORCHRUN, "rl", NCCL_SOCKET_IFNAME="lo", **own, **SEVERAL_NODES, **venv)[1])
    assert own.items() <= seen.items()
    (tmp_path / "nccl.conf").write_text("NCCL_DEBUG=VERSION\nNCCL_IB_TIMEOUT = 23\n")
    seen = variables(script(TORCHRUN, "rl", NCCL_CONF_FILE=str(tmp_path / "nccl.conf"), **SEVERAL_NODES, **venv)[1])
    assert not {"NCCL_DEBUG", "NCCL_IB_TIMEOUT"} & seen.keys()


def test_the_page_of_networks_lists_the_defaults():
    page = (ROOT / "docs" / "gpu.md").read_text().split("## Networks")[1].split("\n## ")[0]
    defaults = dict(re.findall(r"^ *default (\w+) (\w+)", TORCHRUN.read_text(), re.M))
    assert defaults == {**DEFAULTS, "NCCL_IB_TIMEOUT": "22"}
    assert all(f"`{name}={value}`" in page for name, value in defaults.items())
    # torch reads each TORCH_ variable that the page names; those for NCCL are in headers of the CPU's build too
    sources = Path(torch.__file__).parent / "include/torch/csrc/distributed/c10d"
    known = set(re.findall(r"TORCH_NCCL_\w+", (sources / "ProcessGroupNCCL.hpp").read_text()))
    with (Path(torch.__file__).parent / "lib/libtorch_cpu.so").open("rb") as library:
        content = mmap.mmap(library.fileno(), 0, access=mmap.ACCESS_READ)
        named = set(re.findall(r"TORCH_(?:NCCL|FR)_\w+", page))
        assert named and all(name in known or content.find(name.encode()) > 0 for name in named)


@pytest.mark.parametrize("path", [TORCHRUN, SBATCH])
def test_the_scripts_parse(path):
    assert subprocess.run(["bash", "-n", str(path)], capture_output=True).returncode == 0
    if shutil.which("shellcheck"):
        checked = subprocess.run(["shellcheck", str(path)], capture_output=True, text=True)
        assert checked.returncode == 0, checked.stdout


def test_several_nodes(venv):
    _, output = script(
        TORCHRUN, "rl", NNODES="2:4", RDZV="node1:29500", RDZV_ID="run7", LOCAL_ADDR="10.0.0.2", NPROC="8", **venv
    )
    assert (
        "--nnodes 2:4 --rdzv-backend c10d --rdzv-endpoint node1:29500 --rdzv-id run7 --local-addr 10.0.0.2 "
        "--nproc-per-node 8 " in output
    )
    assert (
        "--rdzv-conf is_host=true"
        in script(TORCHRUN, "rl", NNODES="2", RDZV="10.0.0.2:1", LOCAL_ADDR="10.0.0.2", **venv)[1]
    )


@pytest.mark.parametrize(
    ("arguments", "environment", "message"),
    [
        ([], {}, "no command given"),
        (["sft"], {"NNODES": "2"}, "needs RDZV=host:port"),
        (["sft"], {"PCTRAIN_VENV": "/absent"}, "run launch/setup.sh"),
        (["sft"], {"PCTRAIN_VENV": "absent"}, f"{ROOT}/absent/bin/python does not exist: run launch/setup.sh"),
        (["sft"], {"PCTRAIN_VENV": "{tmp}/no-torch"}, "has no torch: run launch/setup.sh"),
    ],
)
def test_torchrun_refuses(venv, tmp_path, arguments, environment, message):
    executable(tmp_path / "no-torch/bin/python", "exit 1")
    own = {name: value.format(tmp=tmp_path) for name, value in environment.items()}
    status, output = script(TORCHRUN, *arguments, **venv | own)
    assert status == 2 and message in output


@pytest.fixture
def slurm(tmp_path):
    """Return a fake Slurm that records its calls and runs steps here, and a torchrun.sh that records its start."""
    executable(tmp_path / "bin/srun", 'shift; exec "$@"')
    executable(tmp_path / "bin/scontrol", f'echo "scontrol $*" >> {tmp_path}/calls; echo node7; echo node8')
    executable(
        tmp_path / "launch/torchrun.sh",
        f"""echo "$NNODES $RDZV $RDZV_ID ${{NPROC:-}} $*" >> {tmp_path}/calls
echo "${{SRUN_CPUS_PER_TASK:-}}" >> {tmp_path}/cores
for argument in "$@"; do case "$argument" in --run.dir=*) run="${{argument#--run.dir=}}" ;; esac; done
mkdir -p "$run"; [[ -z "${{STOPPED:-}}" ]] || touch "$run/to-be-continued"; exit "${{STATUS:-0}}" """,
    )
    return {
        "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}",
        "PCTRAIN_ROOT": str(tmp_path),
        "RUN_DIR": str(tmp_path / "run"),
        "SLURM_JOB_ID": "20042",
        "SLURM_JOB_NUM_NODES": "2",
        "SLURM_JOB_NODELIST": "node[7-8]",
        "SLURM_GPUS_ON_NODE": "8",
    }


def test_slurm_starts_every_node_and_asks_for_its_place_again(slurm, tmp_path):
    status, output = script(SBATCH, "sft", "--config", "x.yaml", STOPPED="1", **slurm)
    assert status == 0 and "to be continued: requeued" in output
    calls = (tmp_path / "calls").read_text().splitlines()
    assert calls == [
        "scontrol show hostnames node[7-8]",
        f"2 node7:20042 20042 8 sft --config x.yaml --run.dir={tmp_path}/run",
        "scontrol requeue 20042",
    ]


def test_slurm_leaves_the_queue_when_the_run_has_finished_or_failed(slurm, tmp_path):
    assert script(SBATCH, "sft", **slurm)[0] == 0
    assert script(SBATCH, "sft", STATUS="1", **slurm)[0] == 1
    assert "requeue" not in (tmp_path / "calls").read_text()


@pytest.mark.parametrize(
    ("variables", "cores"),
    [({}, ""), ({"SLURM_CPUS_PER_TASK": "64"}, "64"), ({"SLURM_CPUS_PER_TASK": "64", "SRUN_CPUS_PER_TASK": "8"}, "8")],
)
def test_srun_gets_the_cores_of_the_job(slurm, tmp_path, variables, cores):
    assert script(SBATCH, "sft", **slurm, **variables)[0] == 0
    assert (tmp_path / "cores").read_text().strip() == cores


def test_an_array_is_one_run_a_seed(slurm, tmp_path):
    script(SBATCH, "rl", SLURM_ARRAY_TASK_ID="2", **slurm)
    assert f"rl --run.dir={tmp_path}/run/seed-2 --run.seed=2" in (tmp_path / "calls").read_text()


@pytest.mark.parametrize(
    ("left_out", "arguments", "message"),
    [
        ("RUN_DIR", ["sft"], "set RUN_DIR"),
        ("", [], "no command given"),
        ("PCTRAIN_ROOT", ["sft"], "submit from the checkout"),
    ],
)
def test_slurm_refuses(slurm, tmp_path, left_out, arguments, message):
    environment = {name: value for name, value in slurm.items() if name != left_out} | {
        "SLURM_SUBMIT_DIR": str(tmp_path / "elsewhere")
    }
    status, output = script(SBATCH, *arguments, **environment)
    assert status == 2 and message in output
