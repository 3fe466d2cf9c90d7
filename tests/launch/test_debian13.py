"""Debian 13, whose python3 is 3.13, in a folder by debootstrap: launch/setup.sh and a part of the tests run there."""

import ast
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = "python3,python3-venv,libnuma1,ca-certificates"  # nothing else: no compiler, no git
GIGABYTES = 20  # of free space: a torch with CUDA libraries takes 8 GB while it is installed

# Mounts and processes end with the namespaces that `unshare` makes, in whatever way the test ends.
ENTER = """
set -eu
root="$1" command="$2"; shift 2
mount --rbind /dev "$root/dev"
mount --rbind /sys "$root/sys"
mount -t proc proc "$root/proc"
for path in "$@"; do
  if [[ -d "$path" ]]; then mkdir -p "$root$path"; else mkdir -p "$(dirname "$root$path")"; touch "$root$path"; fi
  mount --bind --read-only "$(realpath "$path")" "$root$path"
done
exec chroot "$root" bash -euc "cd /checkout; $command"
"""
TESTS = (
    "tests/config/test_config.py",
    "tests/data/test_packing.py",
    "tests/core/test_layouts.py",
    "tests/core/test_checkpoint.py::test_same_layout_bit_for_bit",
    "tests/rollout/test_engine.py::test_logprobs_follow_the_updated_weights",
    "tests/cli/test_cli.py",
)


def isolated(*command: str, timeout: int, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a command in new namespaces of mounts and processes, which end with it."""
    return subprocess.run(
        ["unshare", "--mount", "--pid", "--fork", "--kill-child", *command],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=timeout,
        env=environment or None,
    )


def debian_mirror() -> str | None:
    """Return the mirror that this machine's apt takes Debian from, or None."""
    asked = ["apt-get", "indextargets", "--format", "$(REPO_URI) $(CODENAME)", "Created-By: Packages", "Origin: Debian"]
    lines = subprocess.run(asked, capture_output=True, text=True, check=True).stdout.splitlines()
    return next((line.split()[0] for line in lines if re.fullmatch(r"https?://\S+ [a-z]+", line)), None)


def missing() -> str | None:
    """Return what this machine lacks for the test, or None."""
    if os.geteuid() != 0:
        return "needs root"
    for program in ("debootstrap", "apt-get", "unshare"):
        if shutil.which(program) is None:
            return f"{program} is not installed"
    probe = isolated("mount", "-t", "tmpfs", "probe", "/mnt", timeout=60)
    if probe.returncode:
        return f"no mounts here: {probe.stdout.strip()}"
    if debian_mirror() is None:
        return "apt has no mirror of Debian (run apt-get update, where it has one)"
    free = shutil.disk_usage(tempfile.gettempdir()).free / 1e9
    return None if free >= GIGABYTES else f"{tempfile.gettempdir()} has {free:.0f} GB left, not {GIGABYTES}"


def pip_environment() -> dict[str, str]:
    """Return the variables that lead pip and TLS to indexes, proxies and certificates."""
    wanted = re.compile(r"PIP_\w+|SSL_CERT_\w+|\w+_CA_BUNDLE|PCTRAIN_TORCH_INDEX|\w+_proxy", re.IGNORECASE)
    return {name: value for name, value in os.environ.items() if wanted.fullmatch(name)}


def pip_folders(config: str) -> list[str]:
    """Return the folders that pip's settings name, from the lines of `pip config list`. Files count as their folder.

    A folder `simple` is an index, whose links lead to files next to it, so its parent is taken.
    """
    folders = set()
    for line in config.splitlines():
        for word in ast.literal_eval(line.split("=", 1)[1]).split():
            path = Path(word.removeprefix("file://"))
            if path.is_absolute() and path.exists():
                folder = path if path.is_dir() else path.parent
                folders.add(folder.parent if folder.name == "simple" else folder)
    return sorted(map(str, folders))


def settings() -> list[str]:
    """Return the files and folders that the system shares: name resolution, certificates, and what pip reads."""
    config = subprocess.run([sys.executable, "-m", "pip", "config", "list"], capture_output=True, text=True, check=True)
    system = map(Path, ("/etc/hosts", "/etc/resolv.conf", "/etc/ssl/certs", "/usr/local/share/ca-certificates"))
    pip = (Path("/etc/pip.conf"), Path("/etc/xdg/pip"), Path.home() / ".config" / "pip", Path.home() / ".pip")
    return sorted({*pip_folders(config.stdout), *(str(path) for path in (*system, *pip) if path.exists())})


def copy_checkout(to: Path) -> None:
    """Copy the tracked files as they are in the working tree."""
    tracked = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in filter(None, tracked.split("\0")):
        (to / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, to / name)


@pytest.fixture(scope="module")
def debian():
    """Return `debian(command, timeout)`, which runs a command in the checkout on Debian 13 and returns its output."""
    reason = missing()
    if reason:
        pytest.skip(f"Debian 13 in a folder: {reason}")
    with tempfile.TemporaryDirectory(prefix="debian13-") as folder:
        root = Path(folder)
        install = ("debootstrap", "--variant=minbase", f"--include={PACKAGES}", "trixie", folder, debian_mirror())
        made = isolated(*install, timeout=1200)
        assert made.returncode == 0, made.stdout[-3000:]
        copy_checkout(root / "checkout")

        def run(command: str, timeout: int) -> str:
            done = isolated(
                *("bash", "-c", ENTER, "enter", folder, command, *settings()),
                timeout=timeout,
                PATH="/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
                HOME=str(Path.home()),
                LANG="C.UTF-8",
                **pip_environment(),
            )
            assert done.returncode == 0, f"{command}:\n{done.stdout[-6000:]}"
            return done.stdout

        yield run
        assert folder not in Path("/proc/mounts").read_text()


@pytest.mark.full
@pytest.mark.timeout(5400)
def test_debian_13_sets_up_and_trains(debian):
    output = debian("PCTRAIN_DEVICE=cpu bash launch/setup.sh", timeout=3000)
    assert re.search(r"\(cpu, Python 3\.13\.\d+\)", output) and "done in" in output
    assert "ready to train" in debian(".venv/bin/pctrain doctor", timeout=300)
    output = debian(f".venv/bin/python -m pytest -q -x -m 'not full' {' '.join(TESTS)}", timeout=1500)
    assert re.match(r"\d+ passed, \d+ deselected", output.splitlines()[-1])  # and nothing skipped


def test_folders_of_pips_settings_are_found(tmp_path):
    for name in ("wheels", "mirror/simple", "settings"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "settings" / "constraints.txt").touch()
    config = (
        f"global.find-links='{tmp_path}/wheels'\n"
        f"global.extra-index-url='file://{tmp_path}/mirror/simple\\nhttps://example.org/simple'\n"
        f":env:.constraint='{tmp_path}/settings/constraints.txt'\n"
        "global.timeout='180'\nglobal.cert='/nowhere/ca.crt'\n"
    )
    assert pip_folders(config) == [f"{tmp_path}/{name}" for name in ("mirror", "settings", "wheels")]
