"""How often a weight swap is verified, and what a wrong one says."""

from types import SimpleNamespace

import pytest

from pctrain.config import Config
from pctrain.evaluate.scorer import BF16_TOLERANCE, Scorer


@pytest.fixture
def scorer():
    """A scorer whose engine and core are stand-ins: `differences` has one entry a verification."""
    scorer = Scorer.__new__(Scorer)
    scorer.config, scorer._swaps, scorer.hf = Config(), 0, SimpleNamespace(eos_id=2)
    scorer.config.rollout.verify_every = 3
    scorer.problems = [SimpleNamespace(prompt_ids=[5, 6])]
    scorer.found, scorer.differences = 1e-6, []

    def verify(learner, prompts, eos_id):
        scorer.differences.append(scorer.found)
        return scorer.found

    scorer.engine = SimpleNamespace(load_weights=lambda stream: "swap", verify=verify)
    scorer.core = SimpleNamespace(hf_weights=lambda: iter(()))
    return scorer


def test_the_first_swap_and_every_third_after_it_are_verified(scorer):
    counts = []
    for _ in range(8):
        assert scorer.load(scorer.core) == "swap"
        counts.append(len(scorer.differences))
    assert counts == [1, 1, 1, 2, 2, 2, 3, 3]


def test_an_engine_that_goes_wrong_later_is_found(scorer):
    scorer.load(scorer.core)
    scorer.found = 0.5
    scorer.load(scorer.core)
    scorer.load(scorer.core)
    with pytest.raises(RuntimeError, match="differ from the learner's by 5.00e-01 a token, more than 2e-05"):
        scorer.load(scorer.core)


def test_bfloat16_has_a_tolerance_of_its_own(scorer):
    scorer.config.model.dtype, scorer.found = "bfloat16", BF16_TOLERANCE / 2
    scorer.load(scorer.core)
    scorer._swaps, scorer.found = 0, BF16_TOLERANCE * 2
    with pytest.raises(RuntimeError, match="does not hold the learner's weights"):
        scorer.load(scorer.core)
