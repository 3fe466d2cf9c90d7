"""A sharded learner updates the engine's weights: the engine's log-probs become the learner's."""

import numpy as np
import pytest

from pctrain.config.tree import ArchitectureConfig, RolloutConfig
from pctrain.data.scratch_model import make_hf_dir
from tests.helpers import small

EOS = 2


def _difference(directory, layout):
    """Return the largest

    engine log-prob - trained learner's log-prob

     before and after the weight update.
    """
    from pctrain.rollout import RolloutEngine

    model = small.learner(directory, layout)
    for i in range(5):
        small.step(model, i)
    rng = np.random.default_rng(0)
    prompts = [rng.integers(3, 260, length).tolist() for length in (5, 40, 200)]  # a cache block has 128 tokens
    engine = RolloutEngine(directory, RolloutConfig(kv_cache_mb=64), dtype="float32", context=256, eos_id=EOS)
    try:

        def learner_logprobs(token_rows):
            return model.logprobs([small.make_row(tokens[:1], tokens[1:]) for tokens in token_rows], 512)

        before = engine.verify(learner_logprobs, prompts, EOS)
        engine.load_weights(model.hf_weights())
        return before, engine.verify(learner_logprobs, prompts, EOS)
    finally:
        engine.close()


@pytest.mark.parametrize(
    ("layout", "tied"),
    [
        pytest.param({"tensor": 2}, True, id="TP2-tied"),
        pytest.param({"pipeline": 2}, False, id="PP2-untied"),
        pytest.param({"tensor": 2}, False, id="TP2-untied", marks=pytest.mark.full),
        pytest.param({"pipeline": 2}, True, id="PP2-tied", marks=pytest.mark.full),
    ],
)
def test_after_a_weight_update_the_engine_equals_the_learner(ranks, tmp_path, layout, tied):
    architecture = ArchitectureConfig(layers=2, hidden=64, heads=2, kv_heads=2, ffn=96, context=256, tied=tied)
    directory = make_hf_dir(
        tmp_path / "model", architecture, ["12+3=15 so \\boxed{15}", "7-1=6, then"], vocab_size=331, seed=1
    )
    for before, after in ranks.run(_difference, directory, layout, world=2, deadline=240):
        assert before > 1e-2  # the initial weights are distinguishable from the trained ones
        assert after < 1e-4  # fp32 on both sides
