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


@pytest.mark.parametrize("gpu", [False, True])
@pytest.mark.parametrize("te", [False, True])
def test_patches_without_transformer_engine_are_not_about_the_device(monkeypatch, gpu, te):
    """Four patches depend on Transformer Engine or Apex, which a GPU may lack; four on the device; three on neither."""
    from megatron.core import utils
    from megatron.core.optimizer import clip_grads, distrib_optimizer
    from megatron.core.tensor_parallel import layers
    from megatron.core.transformer.moe import moe_utils

    from pctrain.core.patches import patch

    monkeypatch.setattr(patch, "on_gpu", lambda: gpu)
    monkeypatch.setattr(distrib_optimizer, "HAVE_APEX_OR_TE", te)
    monkeypatch.setattr(layers, "_grad_accum_fusion_available", False)  # Apex's; Transformer Engine's is in its layers
    local_norm = utils.local_multi_tensor_l2_norm
    monkeypatch.setattr(clip_grads, "l2_norm_impl", mock.Mock() if te else local_norm)
    monkeypatch.setattr(moe_utils, "te_general_gemm", mock.Mock(), raising=False)
    if not te:
        monkeypatch.delattr(moe_utils, "te_general_gemm")
    of_device = {"device_names", "rng", "expert_dispatch", "uneven_splits"}
    without_te = {"adam_step", "router_product", "gradient_norm"}
    always = {"grad_accumulation", "bucket_padding", "single_rank_collectives", "checkpoint_manager"}
    needed = {name for name in patches.NAMES if patches.load(name).is_needed()}
    assert needed == always | (set() if gpu else of_device) | (set() if te else without_te)


ON_A_GPU_WITHOUT_TE = """
import torch
from megatron.core.transformer.moe.moe_utils import router_gating_linear
from pctrain.core import patches
from pctrain.core.patches import patch

patch.on_gpu = lambda: True
patches.install()
assert torch.tensor.__name__ == "tensor" and not hasattr(torch.tensor, "__wrapped__"), "device names are patched"
inputs, weight = torch.randn(5, 8, requires_grad=True), torch.randn(4, 8, requires_grad=True)
logits = router_gating_linear(inputs, weight, None, torch.float32)
logits.sum().backward()
assert torch.allclose(logits, inputs @ weight.T) and weight.grad is not None
"""


def test_the_router_runs_on_a_gpu_without_transformer_engine():
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run([sys.executable, "-c", ON_A_GPU_WITHOUT_TE], check=True, env=environment)


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
