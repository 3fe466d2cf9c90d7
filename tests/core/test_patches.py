"""Upstream patches: each names a test, the installed version, and what it is for; two are tested here."""

import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from unittest import mock

import numpy as np
import pytest

from pctrain.core import patches
from pctrain.core.megatron_version import TESTED
from tests.helpers import small

ROOT = Path(__file__).resolve().parents[2]


def test_every_file_is_installed():
    files = {path.stem for path in (ROOT / "pctrain" / "core" / "patches").glob("*.py")} - {"__init__", "patch"}
    assert set(patches.NAMES) == files and len(patches.NAMES) == len(files)


@pytest.mark.parametrize("name", patches.NAMES)
def test_a_patch_names_its_version_reason_and_test(name):
    patch = patches.load(name)
    assert patch.version == TESTED[0] and version(patch.package).partition("+")[0] in TESTED
    assert patch.reason
    file, _, function = patch.test.partition("::")
    assert f"def {function}(" in (ROOT / file).read_text()


def _collectives_of_a_step(directory):
    import torch.distributed as dist

    model = small.learner(directory, {})
    buffers = "megatron.core.distributed.param_and_grad_buffer"
    with (
        mock.patch(f"{buffers}.dist_reduce_scatter_func", wraps=dist.reduce_scatter_tensor) as reduce_scatter,
        mock.patch(f"{buffers}.dist_all_gather_func", wraps=dist.all_gather_into_tensor) as gather,
    ):
        small.step(model, 0)
    return reduce_scatter.call_count, gather.call_count


def test_one_rank_reduces_and_gathers_nothing(ranks, hf_dirs):
    assert ranks.run(_collectives_of_a_step, hf_dirs[True], world=1) == [(0, 0)]
    assert all(count > 0 for count in ranks.run(_collectives_of_a_step, hf_dirs[True], world=2)[0])


RUN = """
import multiprocessing
import time

from megatron.core.dist_checkpointing.strategies import filesystem_async
from pctrain.core import patches
from pctrain.core.megatron_version import RESULTS_QUEUE

if __name__ == "__main__":
    patches.install()
    getattr(filesystem_async, RESULTS_QUEUE)()
    [manager] = multiprocessing.active_children()
    print(manager.pid, flush=True)
    time.sleep(60)
"""


def test_the_manager_of_the_writers_dies_with_its_run(tmp_path):
    """A killed run leaves no process behind."""
    script = tmp_path / "run.py"
    script.write_text(RUN)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    run = subprocess.Popen(
        [sys.executable, script], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environment
    )
    manager = int(run.stdout.readline())
    try:
        os.kill(manager, 0)
        run.kill()
        run.wait()
        end = time.monotonic() + 10
        while Path(f"/proc/{manager}/stat").exists() and _state(manager) != "Z":
            assert time.monotonic() < end, "the manager outlived its run"
            time.sleep(0.05)
    finally:
        for process in (run.pid, manager):
            with suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
        run.communicate()


def _state(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return "Z"


def test_padded_buckets_are_saved_at_their_offsets(ranks, hf_dirs, tmp_path):
    """Stages that share a tied embedding have two buckets with padding between them."""
    saved = ranks.run(small.save_and_continue, hf_dirs[True], {"pipeline": 2}, tmp_path / "step-3", 3, world=2)[0]
    loaded = ranks.run(small.load_and_continue, hf_dirs[True], {}, tmp_path / "step-3", 3, world=1)[0]
    np.testing.assert_allclose(loaded[0], saved[0], rtol=1e-5)  # fp32 sums in another order
    np.testing.assert_allclose(loaded[1], saved[1], rtol=1e-4)
