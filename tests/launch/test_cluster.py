"""launch/torchrun.sh with real ranks, which die, are asked to stop and lose their network."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pctrain.run.records import read_values
from tests.helpers import tiny
from tests.helpers.shell import executable

ROOT = Path(__file__).resolve().parents[2]
TORCHRUN = ROOT / "launch" / "torchrun.sh"


def sft(folder, *more):
    return [
        "sft",
        *tiny.OPTIONS,
        f"--run.dir={folder}",
        "--sft.eval_every=0",
        "--sft.steps=60",
        "--sft.checkpoint_every=10",
        "--sft.val_every=20",
        "--run.tensorboard=false",
        *more,
    ]


def launch(arguments, log, before=(), **environment):
    """Return an environment in which torchrun.sh uses this very Python."""
    venv = log.with_name("venv")
    executable(venv / "bin/python", f'exec {sys.executable} "$@"')
    variables = {
        **os.environ,
        "PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}:{os.environ.get('PYTHONPATH', '')}",
        "PCTRAIN_VENV": str(venv),
        "OMP_NUM_THREADS": "1",
        **environment,
    }
    with open(log, "a") as stream:
        return subprocess.Popen(
            [*before, "bash", str(TORCHRUN), *arguments], stdout=stream, stderr=stream, env=variables
        )


def wait_for_step(folder, step, *processes, seconds=240):
    end = time.monotonic() + seconds
    while max(read_values(folder, "train", "loss"), default=0) < step:
        assert time.monotonic() < end and all(process.poll() is None for process in processes), (
            f"step {step} was not reached"
        )
        time.sleep(0.05)


def family(pid):
    """Return {pid: RANK or None} of a process and its descendants; torchrun gives every rank a separate session."""
    children = {}
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
        except OSError:
            continue  # the process has ended
        children.setdefault(parent, []).append(int(entry.name))
    found, todo = {}, [pid]
    while todo:
        one = todo.pop()
        try:
            variables = dict(
                item.split("=", 1) for item in Path(f"/proc/{one}/environ").read_text().split("\0") if "=" in item
            )
            command = Path(f"/proc/{one}/cmdline").read_bytes()
        except OSError:
            continue
        found[one] = int(variables["RANK"]) if b"-m\0pctrain" in command and "RANK" in variables else None
        todo += children.get(one, [])
    return found


def rank(process, number):
    """Return the process of a rank; its children have younger pids."""
    return min(pid for pid, found in family(process.pid).items() if found == number)


def end(process):
    """Kill a process and its descendants."""
    for pid in family(process.pid):
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue
    process.wait()


LOOPBACK = {"NPROC": "2", "LOCAL_ADDR": "127.0.0.1", "GLOO_SOCKET_IFNAME": "lo"}


@pytest.mark.full
@pytest.mark.timeout(600)
def test_a_killed_rank_is_started_again_by_itself(tmp_path):
    folder, log = tmp_path / "run", tmp_path / "log"
    process = launch(sft(folder, "--parallel.timeout=60"), log, **LOOPBACK)
    try:
        wait_for_step(folder, 25, process)
        os.kill(rank(process, 1), signal.SIGKILL)
        assert process.wait(400) == 0, log.read_text()[-3000:]
    finally:
        end(process)
    assert "resumed from step-20" in (folder / "train.log").read_text()
    assert sorted(read_values(folder, "train", "loss")) == list(range(1, 61)) and (folder / "summary.json").exists()


@pytest.mark.full
@pytest.mark.timeout(600)
def test_the_signal_before_the_time_limit(tmp_path):
    """Send USR1 as Slurm does: to every process of the step, including those that start the ranks."""
    folder, log = tmp_path / "run", tmp_path / "log"
    process = launch(sft(folder), log, **LOOPBACK)
    try:
        wait_for_step(folder, 15, process)
        for pid in family(process.pid):
            os.kill(pid, signal.SIGUSR1)
        assert process.wait(200) == 0, log.read_text()[-3000:]
    finally:
        end(process)
    assert (folder / "to-be-continued").exists() and "to be continued" in log.read_text()


def _may_make_namespaces():
    if os.geteuid() != 0:
        return "needs root"
    made = subprocess.run(["ip", "netns", "add", "pctrain-probe"], capture_output=True)
    if made.returncode:
        return f"no network namespaces here: {made.stderr.decode().strip()}"
    subprocess.run(["ip", "netns", "delete", "pctrain-probe"], check=True)
    return None


@pytest.fixture
def two_hosts():
    """Return the names of two network namespaces, 10.77.0.1 and 10.77.0.2, connected by a veth pair."""
    try:
        reason = _may_make_namespaces()
    except FileNotFoundError:
        reason = "iproute2 is not installed"
    if reason:
        pytest.skip(f"two hosts on one machine: {reason}")
    names = [f"pctrain-{os.getpid()}-{side}" for side in "ab"]

    def run(line):
        subprocess.run(["ip", *line.split()], check=True)

    try:
        for name in names:
            run(f"netns add {name}")
        run(f"link add veth0 netns {names[0]} type veth peer name veth0 netns {names[1]}")
        for number, name in enumerate(names, start=1):
            run(f"-n {name} addr add 10.77.0.{number}/24 dev veth0")
            run(f"-n {name} link set veth0 up")
            run(f"-n {name} link set lo up")
        yield names
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "delete", name])


def start_hosts(hosts, arguments, folder, **environment):
    return [
        launch(
            arguments,
            _log(folder, side),
            ["ip", "netns", "exec", host],
            NNODES="2",
            NPROC="2",
            RDZV="10.77.0.1:29400",
            LOCAL_ADDR=f"10.77.0.{number}",
            GLOO_SOCKET_IFNAME="veth0",
            MAX_RESTARTS="0",
            **environment,
        )
        for number, (side, host) in enumerate(zip("ab", hosts, strict=True), start=1)
    ]


def _log(folder, side):
    (folder / side).mkdir(exist_ok=True)
    return folder / side / "log"


@pytest.mark.full
@pytest.mark.timeout(900)
@pytest.mark.parametrize("how", ["cut off", "killed"])
def test_a_lost_host_is_reported_within_the_deadline_and_a_restart_resumes(two_hosts, tmp_path, how):
    folder = tmp_path / "run"
    arguments = sft(folder, "--parallel.tensor=2", "--parallel.timeout=30")
    hosts = start_hosts(two_hosts, arguments, tmp_path)
    try:
        wait_for_step(folder, 25, *hosts)
        if how == "killed":
            end(hosts[1])
        else:
            subprocess.run(["ip", "-n", two_hosts[1], "link", "set", "veth0", "down"], check=True)
        assert (
            hosts[0].wait(120) != 0
        )  # the deadline is 30 s, the grace 6 s; the rest allows for torchrun's own exit and a busy machine
        output = (tmp_path / "a" / "log").read_text()
        if how == "killed":
            assert "error: rank 2, 3 does not answer: dead, stopped, or cut off" in output
        else:  # both sides live and share the run folder: only the network fails
            assert "the network between them is cut" in output
    finally:
        for host in hosts:
            end(host)
    subprocess.run(["ip", "-n", two_hosts[1], "link", "set", "veth0", "up"], check=True)
    hosts = start_hosts(two_hosts, arguments, tmp_path)
    try:
        assert [host.wait(300) for host in hosts] == [0, 0], (tmp_path / "a" / "log").read_text()[-3000:]
    finally:
        for host in hosts:
            end(host)
    assert "resumed from step-20" in (folder / "train.log").read_text()
    assert sorted(read_values(folder, "train", "loss")) == list(range(1, 61))
