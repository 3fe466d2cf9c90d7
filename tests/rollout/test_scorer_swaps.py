"""How often a weight swap is verified, and what a wrong one says."""

from types import SimpleNamespace

import pytest

from pctrain.config.tree import Config
from pctrain.rollout.worker import BF16_TOLERANCE, RolloutWorker


@pytest.fixture
def worker():
    """A scorer whose engine and core are stand-ins: `differences` has one entry a verification."""
    worker = RolloutWorker.__new__(RolloutWorker)
    worker.config, worker._swaps, worker.tokenizer = Config(), 0, SimpleNamespace(eos_id=2)
    worker.config.rollout.verify_every = 3
    worker.problems = [SimpleNamespace(prompt_ids=[5, 6])]
    worker.found, worker.differences = 1e-6, []

    def verify(learner, prompts, eos_id):
        worker.differences.append(worker.found)
        return worker.found

    worker.engine = SimpleNamespace(load_weights=lambda stream: "swap", verify=verify)
    worker.learner = SimpleNamespace(hf_weights=lambda: iter(()))
    return worker


def test_the_first_swap_and_every_third_after_it_are_verified(worker):
    counts = []
    for _ in range(8):
        assert worker.load(worker.learner) == "swap"
        counts.append(len(worker.differences))
    assert counts == [1, 1, 1, 2, 2, 2, 3, 3]


def test_an_engine_that_goes_wrong_later_is_found(worker):
    worker.load(worker.learner)
    worker.found = 0.5
    worker.load(worker.learner)
    worker.load(worker.learner)
    with pytest.raises(RuntimeError, match="differ from the learner's by 5.00e-01 a token, more than 2e-05"):
        worker.load(worker.learner)


def test_bfloat16_has_a_tolerance_of_its_own(worker):
    worker.config.model.dtype, worker.found = "bfloat16", BF16_TOLERANCE / 2
    worker.load(worker.learner)
    worker._swaps, worker.found = 0, BF16_TOLERANCE * 2
    with pytest.raises(RuntimeError, match="does not hold the learner's weights"):
        worker.load(worker.learner)
