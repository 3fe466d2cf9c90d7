"""How often a weight update is verified, and what a wrong one says."""

from types import SimpleNamespace

import pytest

import pctrain.rollout.worker as worker_module
from pctrain.config.tree import Config
from pctrain.rollout.worker import VERIFY_TOLERANCE, RolloutWorker


@pytest.fixture
def worker():
    """A worker whose engine and learner are fakes: `differences` has one entry per verification."""
    worker = RolloutWorker.__new__(RolloutWorker)
    worker.config, worker.weight_updates, worker.tokenizer = Config(), 0, SimpleNamespace(eos_id=2)
    worker.config.rollout.verify_every = 3
    worker.problems = [SimpleNamespace(prompt_ids=[5, 6])]
    worker.difference, worker.differences = 1e-6, []

    def verify(learner, prompts, eos_id):
        worker.differences.append(worker.difference)
        return worker.difference

    worker.engine = SimpleNamespace(load_weights=lambda stream: "weight update", verify=verify)
    worker.learner = SimpleNamespace(hf_weights=lambda: iter(()))
    return worker


def test_the_first_update_and_every_third_after_it_are_verified(worker):
    counts = []
    for _ in range(8):
        assert worker.update_weights(worker.learner) == "weight update"
        counts.append(len(worker.differences))
    assert counts == [1, 1, 1, 2, 2, 2, 3, 3]


def test_an_engine_that_goes_wrong_later_is_detected(worker):
    worker.update_weights(worker.learner)
    worker.difference = 0.5
    worker.update_weights(worker.learner)
    worker.update_weights(worker.learner)
    message = r"differ from the learner's by 5.00e-01 nats per token, more than rollout.verify_tolerance = 2e-05"
    with pytest.raises(RuntimeError, match=message):
        worker.update_weights(worker.learner)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_each_dtype_has_a_default_tolerance(worker, dtype):
    worker.config.model.dtype, worker.difference = dtype, VERIFY_TOLERANCE[dtype] / 2
    worker.update_weights(worker.learner)
    worker.weight_updates, worker.difference = 0, VERIFY_TOLERANCE[dtype] * 2
    with pytest.raises(RuntimeError, match="does not hold the learner's weights"):
        worker.update_weights(worker.learner)


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 5e-3), ("bfloat16", 0.1)])
def test_default_tolerance_on_a_gpu(worker, dtype, tolerance, monkeypatch):
    monkeypatch.setattr(worker_module, "on_gpu", lambda: True)
    worker.config.model.dtype, worker.difference = dtype, tolerance * 0.9
    worker.update_weights(worker.learner)
    worker.weight_updates, worker.difference = 0, tolerance * 1.1
    with pytest.raises(RuntimeError, match=f"verify_tolerance = {tolerance:.0e}"):
        worker.update_weights(worker.learner)


@pytest.mark.parametrize("gpu", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_tolerance_that_is_set_holds_for_every_dtype(worker, dtype, gpu, monkeypatch):
    monkeypatch.setattr(worker_module, "on_gpu", lambda: gpu)
    worker.config.model.dtype, worker.config.rollout.verify_tolerance, worker.difference = dtype, 0.01, 0.005
    worker.update_weights(worker.learner)
    worker.weight_updates, worker.difference = 0, 0.05
    with pytest.raises(RuntimeError, match=r"more than rollout.verify_tolerance = 1e-02"):
        worker.update_weights(worker.learner)
