"""Mismatch of learner and engine: the metrics, and the check that both are one policy in the first update."""

import math

import numpy as np
import pytest
import torch

from pctrain.config.tree import ArchitectureConfig, RolloutConfig
from pctrain.data.rows import make_row
from pctrain.data.scratch_model import make_hf_dir
from pctrain.rl import mismatch
from pctrain.rollout import Request, sampling_seed
from tests.helpers import small

EOS, TEMPERATURE, PROMPTS = 2, 0.7, 6


def of_one_token(learner: float, engine: float, **streams: float) -> dict[str, float]:
    streams = {"advantage": 1.0, "rollout_logprob": engine, **streams}
    tensors = {name: torch.tensor([value], dtype=torch.float64) for name, value in streams.items()}
    loss = mismatch.measured(lambda logprob, entropy, streams: (-logprob, {}))
    _, metrics = loss(torch.tensor([learner], dtype=torch.float64, requires_grad=True), None, tensors)
    assert not any(value.requires_grad for value in metrics.values())
    return {name: value.item() for name, value in metrics.items()}


def test_the_measures_by_hand():
    equal = of_one_token(-1.5, -1.5)
    assert equal == {"mismatch/mean": 0, "max/mismatch": 0, "mismatch/kl": 0, "mismatch/beyond_2x": 0}
    thrice = of_one_token(math.log(0.6), math.log(0.2))  # ratio 3: KL 3 - 1 - ln 3
    assert thrice["mismatch/mean"] == thrice["max/mismatch"] == pytest.approx(math.log(3))
    assert thrice["mismatch/kl"] == pytest.approx(2 - math.log(3)) and thrice["mismatch/beyond_2x"] == 1
    third = of_one_token(math.log(0.2), math.log(0.6))  # ratio 1/3: KL 1/3 - 1 + ln 3
    assert third["mismatch/mean"] == pytest.approx(math.log(3)) and third["mismatch/beyond_2x"] == 1
    assert third["mismatch/kl"] == pytest.approx(math.log(3) - 2 / 3)
    assert of_one_token(math.log(0.39), math.log(0.2))["mismatch/beyond_2x"] == 0  # 1.95


def test_the_policy_that_sampled_is_the_old_one_where_there_is_one():
    assert of_one_token(-9.0, -1.5, old_logprob=-1.5)["mismatch/mean"] == 0


def test_tokens_that_the_engine_did_not_sample_are_not_measured():
    assert set(of_one_token(-9.0, math.nan).values()) == {0.0}


def test_without_the_engines_logprobs_the_loss_is_unchanged():
    streams = {"advantage": torch.ones(2)}
    loss = mismatch.measured(lambda logprob, entropy, given: (given["advantage"], {"ratio": logprob}))
    value, metrics = loss(torch.zeros(2), None, streams)
    assert value is streams["advantage"] and set(metrics) == {"ratio"}


def test_in_bfloat16_the_correction_is_on_unless_the_config_says_otherwise():
    assert mismatch.correction(None, "bfloat16") == "token" and mismatch.correction(None, "float32") == "none"
    assert (
        mismatch.correction("none", "bfloat16") == "none" and mismatch.correction("sequence", "float32") == "sequence"
    )


def _first_step(directory, layout, tensor):
    """Sample with a real engine and train on that; return (first update, rows, the learner's log-probs, weights)."""
    from pctrain.rollout import RolloutEngine

    model = small.learner(directory, layout)
    for i in range(3):
        small.step(model, i)
    weights = {name: tensor.clone() for name, tensor in model.hf_weights()}
    engine = RolloutEngine(
        directory, RolloutConfig(kv_cache_mb=64, tensor=tensor), dtype="float32", context=256, eos_id=EOS
    )
    try:
        engine.load_weights(model.hf_weights())
        rng = np.random.default_rng(0)
        prompts = [rng.integers(3, 260, 8).tolist() for _ in range(PROMPTS)]
        requests = [Request(prompt, sampling_seed(0, "test", 1, i, 0)) for i, prompt in enumerate(prompts)]
        completions = engine.generate(requests, temperature=TEMPERATURE, max_response=12, logprobs=True)
    finally:
        engine.close()
    rows = [
        make_row(p, c.token_ids, {"advantage": float(rng.normal())}) for p, c in zip(prompts, completions, strict=True)
    ]
    for row, prompt, completion in zip(rows, prompts, completions, strict=True):
        row.streams["rollout_logprob"] = np.float32([math.nan] * len(prompt) + completion.logprobs)
    logprobs = model.logprobs(rows, 512, temperature=TEMPERATURE, trained_only=True)

    def loss(logprob, entropy, streams):
        return -logprob * streams["advantage"], {"entropy": entropy}

    update = model.train_step(model.pack(rows, 512), mismatch.measured(loss), temperature=TEMPERATURE)
    return update, rows, logprobs, weights


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    architecture = ArchitectureConfig(layers=2, hidden=128, heads=4, kv_heads=4, ffn=96, context=256, tied=True)
    folder = tmp_path_factory.mktemp("mismatch") / "model"
    return make_hf_dir(folder, architecture, ["12+3=15 so \\boxed{15}", "7-1=6, then"], vocab_size=331, seed=1)


@pytest.mark.parametrize(
    "layout, tensor, world",
    [
        pytest.param({}, 1, 1, id="single"),
        pytest.param({"tensor": 2}, 2, 2, id="TP2, one engine", marks=pytest.mark.full),
        pytest.param({"tensor": 2}, 1, 2, id="TP2, an engine a rank", marks=pytest.mark.full),
        pytest.param({"tensor": 4}, 2, 4, id="TP4, two engines of two ranks", marks=pytest.mark.full),
    ],
)
def test_in_the_first_update_learner_and_engine_are_one_policy(ranks, directory, layout, tensor, world):
    for update, rows, logprobs, _ in ranks.run(_first_step, directory, layout, tensor, world=world, deadline=240):
        metrics = update.metrics
        assert 0 <= metrics["mismatch/mean"] <= metrics["max/mismatch"]
        assert math.expm1(metrics["max/mismatch"]) < 1e-4  # every ratio is 1
        assert abs(metrics["mismatch/kl"]) < 1e-8 and metrics["mismatch/beyond_2x"] == 0
        # The training pass measures the same as a separate pass.
        worst = max(
            np.abs(lp - row.streams["rollout_logprob"])[row.weights > 0].max()
            for row, lp in zip(rows, logprobs, strict=True)
        )
        assert metrics["max/mismatch"] == pytest.approx(worst, abs=3e-6)


def test_one_temperature_for_engine_logprobs_entropy_and_loss(ranks, directory):
    """Engine and learner agree with transformers at that temperature; at any other the values are far off."""
    from transformers import LlamaForCausalLM

    ((update, rows, logprobs, weights),) = ranks.run(_first_step, directory, {}, 1, world=1, deadline=240)
    model = LlamaForCausalLM.from_pretrained(directory, dtype=torch.float32, attn_implementation="eager")
    model.load_state_dict(dict(weights), strict=False)
    total, entropy, tokens = 0.0, 0.0, 0
    for row, ours in zip(rows, logprobs, strict=True):
        ids, sampled = torch.from_numpy(row.tokens), torch.from_numpy(row.weights[1:] > 0)
        scores = torch.log_softmax(model(ids[None]).logits[0, :-1] / TEMPERATURE, -1)
        logprob = scores.gather(-1, ids[1:, None])[:, 0][sampled]
        np.testing.assert_allclose(
            row.streams["rollout_logprob"][1:][sampled], logprob.detach(), atol=1e-4
        )  # the engine's
        np.testing.assert_allclose(ours[1:][sampled], logprob.detach(), atol=1e-4)  # of a separate pass
        total = total - (logprob * row.streams["advantage"][0]).sum()
        entropy -= (scores.exp() * scores).sum(-1)[sampled].sum().item()
        tokens += int(sampled.sum())
    (total / tokens).backward()
    norm = torch.sqrt(sum(parameter.grad.square().sum() for parameter in model.parameters()))
    assert update.loss == pytest.approx((total / tokens).item(), abs=1e-5)
    assert update.metrics["entropy"] == pytest.approx(entropy / tokens, abs=1e-4)
    assert update.grad_norm == pytest.approx(norm.item(), rel=1e-3)
