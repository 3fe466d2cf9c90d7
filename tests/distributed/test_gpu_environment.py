"""Environment variables of a GPU process: defaults, what a user has set, and the switches of `model.deterministic`."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from pctrain.common.errors import UserError
from pctrain.distributed import gpu_environment

NAMES = (*gpu_environment.ALLOCATOR, *gpu_environment.DEFAULTS, *gpu_environment.DETERMINISTIC)


@pytest.fixture
def environment(monkeypatch):
    """Begin without the variables; return the environment."""
    for name in NAMES:
        monkeypatch.setenv(name, "")  # so that it is restored
        monkeypatch.delenv(name)
    return os.environ


def _set(environment):
    return {name: environment[name] for name in NAMES if name in environment}


@pytest.mark.parametrize("gpu", [True, False])
def test_defaults(environment, monkeypatch, gpu):
    monkeypatch.setattr(gpu_environment, "on_gpu", lambda: gpu)
    gpu_environment.prepare()
    gpu_environment.prepare()
    assert _set(environment) == {
        "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True",
        "CUDA_DEVICE_MAX_CONNECTIONS": "1",
    }


@pytest.mark.parametrize("name", gpu_environment.ALLOCATOR)
def test_what_a_user_has_set_stays(environment, name):
    environment[name] = "max_split_size_mb:512"
    environment["CUDA_DEVICE_MAX_CONNECTIONS"] = "8"
    gpu_environment.prepare()
    assert _set(environment) == {name: "max_split_size_mb:512", "CUDA_DEVICE_MAX_CONNECTIONS": "8"}


def test_of_two_settings_of_the_allocator_torch_takes_the_old_name(environment):
    code = "import torch; torch._C._accelerator_setAllocatorSettings('max_split_size_mb:100')"  # reads them first
    for names in (gpu_environment.ALLOCATOR, reversed(gpu_environment.ALLOCATOR)):
        set_here = dict(zip(names, ("max_split_size_mb:5", "max_split_size_mb:100"), strict=True))
        done = subprocess.run([sys.executable, "-c", code], env=environment | set_here, capture_output=True, text=True)
        is_read = set_here[gpu_environment.ALLOCATOR[0]] == "max_split_size_mb:5"
        assert ("max_split_size_mb too small" in done.stderr) == is_read == (done.returncode != 0)
    environment["PYTORCH_CUDA_ALLOC_CONF"], environment["PYTORCH_ALLOC_CONF"] = "", "expandable_segments:True"
    assert gpu_environment.expandable_segments()
    environment["PYTORCH_CUDA_ALLOC_CONF"] = "expandable_segments:False"
    assert not gpu_environment.expandable_segments()


@pytest.mark.parametrize(
    "name, value, expected",
    [
        ("PYTORCH_CUDA_ALLOC_CONF", "", True),  # not set: the default
        ("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:False", False),
        ("PYTORCH_ALLOC_CONF", "max_split_size_mb:512, expandable_segments: true", True),
        ("PYTORCH_ALLOC_CONF", "max_split_size_mb:512", False),
    ],
)
def test_vllms_own_all_reduce_is_off_with_them(environment, monkeypatch, tmp_path, name, value, expected):
    """It would share the memory of CUDA graphs over CUDA IPC, which takes no expandable segments, and exit."""
    from pctrain.config.tree import RolloutConfig
    from pctrain.rollout import vllm_setup
    from pctrain.rollout.sharing import EngineGroups

    environment[name] = value
    gpu_environment.prepare()
    monkeypatch.setattr(vllm_setup, "on_gpu", lambda: True)
    options = vllm_setup.engine_options(tmp_path, RolloutConfig(), EngineGroups(1), dtype="bfloat16", context=512)
    assert options["disable_custom_all_reduce"] is expected
    monkeypatch.setattr(vllm_setup, "on_gpu", lambda: False)
    options = vllm_setup.engine_options(tmp_path, RolloutConfig(), EngineGroups(1), dtype="bfloat16", context=512)
    assert "disable_custom_all_reduce" not in options


def test_a_deterministic_gpu_gets_every_switch(environment, monkeypatch):
    monkeypatch.setattr(gpu_environment, "on_gpu", lambda: True)
    environment["NCCL_ALGO"] = "Tree"
    gpu_environment.prepare(deterministic=True)
    assert _set(environment) == gpu_environment.DEFAULTS | {
        "NVTE_ALLOW_NONDETERMINISTIC_ALGO": "0",
        "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
        "NCCL_ALGO": "Tree",
        "VLLM_BATCH_INVARIANT": "1",
    }


def test_what_vllm_sets_for_its_engine_is_accepted_later(environment, monkeypatch):
    """A learner may be built after an engine, in the environment that the engine has left."""
    spec = importlib.util.find_spec("vllm")
    if spec is None:
        pytest.skip("vLLM is not installed")
    source = Path(spec.origin).parent / "model_executor" / "determinism" / "batch_invariant.py"
    [algorithm] = re.findall(r'"NCCL_ALGO": "([^"]+)"', source.read_text())
    workspaces = re.findall(r'environ\["CUBLAS_WORKSPACE_CONFIG"\] = "([^"]+)"', source.read_text())
    monkeypatch.setattr(gpu_environment, "on_gpu", lambda: True)
    gpu_environment.prepare(deterministic=True)
    for workspace in workspaces:
        environment.update(NCCL_ALGO=algorithm, CUBLAS_WORKSPACE_CONFIG=workspace)
        gpu_environment.prepare(deterministic=True)
        assert environment["CUBLAS_WORKSPACE_CONFIG"] == workspace
    assert len(workspaces) == 2


def test_a_deterministic_cpu_gets_none(environment, monkeypatch):
    """vLLM's CPU engine does not start with VLLM_BATCH_INVARIANT."""
    monkeypatch.setattr(gpu_environment, "on_gpu", lambda: False)
    gpu_environment.prepare(deterministic=True)
    assert _set(environment) == gpu_environment.DEFAULTS


def test_an_environment_that_says_the_opposite_is_refused(environment, monkeypatch):
    monkeypatch.setattr(gpu_environment, "on_gpu", lambda: True)
    environment["NVTE_ALLOW_NONDETERMINISTIC_ALGO"] = "1"
    with pytest.raises(UserError, match="NVTE_ALLOW_NONDETERMINISTIC_ALGO=1; expected 0"):
        gpu_environment.prepare(deterministic=True)


ASKED = """
import os
import torch
asked = torch.cuda.is_available

def is_available():
    assert os.environ.get("CUDA_DEVICE_MAX_CONNECTIONS") == "1", "too late"
    assert os.environ.get("PYTORCH_CUDA_ALLOC_CONF") == "expandable_segments:True", "too late"
    return asked()

torch.cuda.is_available = is_available
"""
JOIN = """
from pctrain.distributed import parallel
parallel.join(60.0)
"""
LEARNER = """
from types import SimpleNamespace
from pctrain.core import Learner
try:
    Learner(SimpleNamespace(deterministic=False), None, optimizer_config=None, total_steps=1, seed=0)
except AttributeError as error:
    assert "timeout" in str(error)  # of the layout that it did not get
"""


@pytest.mark.parametrize("start", [JOIN, LEARNER], ids=["join", "learner"])
def test_ranks_set_the_defaults_before_they_ask_for_a_gpu(start):
    environment = {name: value for name, value in os.environ.items() if name not in NAMES}
    environment["PYTHONPATH"] = os.pathsep.join(sys.path)
    subprocess.run([sys.executable, "-c", ASKED + start], check=True, env=environment)


def _deterministic_step(directory, gpu):
    """Return what a step, a log-prob pass and their end see of torch's deterministic mode."""
    from unittest import mock

    import torch

    from pctrain.core import model as models
    from pctrain.core import step
    from tests.helpers import small

    seen = []
    place = step.DevicePack.place

    def look(*arguments, **options):
        seen.append(torch.are_deterministic_algorithms_enabled())
        return place(*arguments, **options)

    with mock.patch.object(models, "on_gpu", return_value=gpu), mock.patch.object(step.DevicePack, "place", look):
        learner = small.learner(directory, {}, deterministic=True)
        losses = [small.step(learner, i).loss for i in range(2)]
        learner.logprobs(small.rows(3), small.BUDGET)
    return losses, set(seen), torch.are_deterministic_algorithms_enabled()


def test_the_learner_of_a_gpu_computes_deterministically_and_that_of_a_cpu_as_ever(ranks, hf_dirs):
    [(on_gpu, inside, after)] = ranks.run(_deterministic_step, hf_dirs[True], True, world=1)
    assert inside == {True} and after is False
    [(on_cpu, inside, after)] = ranks.run(_deterministic_step, hf_dirs[True], False, world=1)
    assert inside == {False} and after is False
    assert on_gpu == on_cpu
