"""Rollouts come from the learner's full policy: no sampling settings of the model, and no cut of the tail."""

import json
import random

import pytest

from pctrain.config.tree import RolloutConfig
from pctrain.rollout import Request, RolloutEngine, sampling_seed

EOS = 2


def test_a_models_generation_config_is_not_obeyed(tiny, tmp_path):
    """Published models come with top_p, penalties and stop tokens: a part of the policy unknown to the learner."""
    model = tiny.build(True, seed=0)
    model.save_pretrained(tmp_path)
    advice = {
        "eos_token_id": list(range(100, 200)),
        "top_k": 1,
        "top_p": 0.1,
        "repetition_penalty": 3.0,
        "do_sample": True,
    }
    (tmp_path / "generation_config.json").write_text(json.dumps(advice))
    engine = RolloutEngine(tmp_path, RolloutConfig(kv_cache_mb=64), dtype="float32", context=256, eos_id=EOS)
    try:
        draw = random.Random(0)
        prompts = [[draw.randrange(3, 320) for _ in range(6)] for _ in range(20)]
        requests = [Request(prompt, sampling_seed(0, "test", 0, i, 0)) for i, prompt in enumerate(prompts)]
        completions = engine.generate(requests, temperature=2.0, max_response=20, logprobs=True)
    finally:
        engine.close()
    assert any(
        100 <= token < 200 for completion in completions for token in completion.token_ids[:-1]
    )  # none of these stops
    scores = tiny.oracle(model, 2.0)(
        [prompt + completion.token_ids for prompt, completion in zip(prompts, completions, strict=True)]
    )
    for prompt, completion, row in zip(prompts, completions, scores, strict=True):
        assert (
            abs(row[len(prompt) :] - completion.logprobs).max() < 1e-4
        )  # of the whole distribution: nothing was cut or penalised
    assert min(min(completion.logprobs) for completion in completions) < -6  # its tail is drawn from


@pytest.mark.parametrize("setting", ["top_p=0.9", "top_k=50", "min_p=0.1", "repetition_penalty=1.1"])
def test_training_rollouts_refuse_whatever_cuts_or_bends_the_policy(setting):
    from pctrain.common.errors import UserError
    from pctrain.config.load import load

    with pytest.raises(UserError, match=f"unknown key rollout.{setting.split('=')[0]}"):
        load(None, [f"--rollout.{setting}"])
