"""The formulas of arXiv 2512.11470 give its published figures, and the exact counts equal sums done by hand."""

import pytest

from pctrain.common.errors import UserError
from pctrain.compute import flops
from pctrain.compute.flops import EFLOP
from pctrain.compute.model_shape import QWEN2_5_7B, ModelShape
from pctrain.hf.config import model_shape

QWEN_CONFIG = {
    "num_hidden_layers": 28,
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "vocab_size": 152064,
    "tie_word_embeddings": False,
}


@pytest.mark.parametrize(
    ("steps", "batch", "mean_length", "published"),
    [
        (360, 512, 3771, 34.9),  # SFT889K
        (62, 16, 10011, 0.6),  # S1K
        (360, 512, 2217, 19.8),  # Easy102K
        (14080, 512, 3771, 1365.8),
    ],
)
def test_sft_compute_equals_the_published_figures(steps, batch, mean_length, published):
    eflops = flops.paper_sft(QWEN2_5_7B, steps=steps, batch=batch, mean_length=mean_length) / EFLOP
    # Published with one decimal, from mean lengths rounded to a token: 14080 steps multiply that rounding by 39.
    assert eflops == pytest.approx(published, abs=0.05, rel=2e-4)


def test_rl_steps_are_forward_units_of_the_same_formula():
    f = flops.paper_forward_per_token(QWEN2_5_7B, 2000)
    assert flops.paper_grpo_step(QWEN2_5_7B, batch=128, group=8, mean_length=2000) == pytest.approx(
        4 * 128 * 8 * 2000 * f
    )
    dapo = flops.paper_dapo_step(QWEN2_5_7B, rounds=2, batch_generated=128, batch_trained=64, group=8, mean_length=2000)
    assert dapo == pytest.approx((2 * 128 + 3 * 64) * 8 * 2000 * f)
    # One round that keeps everything is GRPO.
    assert flops.paper_dapo_step(
        QWEN2_5_7B, rounds=1, batch_generated=64, batch_trained=64, group=8, mean_length=500
    ) == pytest.approx(flops.paper_grpo_step(QWEN2_5_7B, batch=64, group=8, mean_length=500))


def test_shape_from_hf_config():
    assert model_shape(QWEN_CONFIG) == QWEN2_5_7B
    assert QWEN2_5_7B.parameters == pytest.approx(7.615e9, rel=1e-3)  # 7.62B; norms and biases are left out
    plain = model_shape({k: v for k, v in QWEN_CONFIG.items() if k != "num_key_value_heads"} | {"head_dim": None})
    assert plain.kv_heads == 28 and plain.head_dim == 128  # attention without groups; head_dim by default
    wide = model_shape(QWEN_CONFIG | {"head_dim": 256, "tie_word_embeddings": True})
    assert wide.query_width == 28 * 256 and wide.kv_width == 4 * 256
    assert wide.parameters == 28 * wide.layer_weights + 152064 * 3584


@pytest.mark.parametrize(
    "change", [{"hidden_size": None}, {"vocab_size": 0}, {"num_hidden_layers": "28"}, {"intermediate_size": True}]
)
def test_a_config_without_a_size_names_file_and_key(change):
    with pytest.raises(UserError, match=rf"model/config.json.*{next(iter(change))}"):
        model_shape(QWEN_CONFIG | change, "model/config.json")


def test_exact_forward_is_the_sum_over_matrix_products():
    shape = ModelShape(layers=2, hidden=8, ffn=16, heads=4, kv_heads=2, head_dim=3, vocab=10)
    length, q, kv = 5, 12, 6
    products = 0
    for _ in range(length):
        products += 2 * (
            8 * q + 2 * 8 * kv + q * 8 + 3 * 8 * 16
        )  # linear: a multiply-add is two; twice for the two layers
        products += 8 * 10  # head
    for position in range(length):
        products += 2 * 2 * q * (position + 1)  # two layers; scores and values over the keys seen so far
    assert flops.exact_forward(shape, [5]) == 2 * products
    assert flops.exact_forward(shape, [5, 5, 5]) == 6 * products
    assert flops.exact_forward(shape, [1, 9]) > flops.exact_forward(shape, [5, 5])  # attention grows with the square


def test_a_step_of_every_algorithm_by_the_papers_formulas():
    def f(length):
        return flops.paper_forward_per_token(QWEN2_5_7B, length)

    luffy = flops.paper_luffy_step(QWEN2_5_7B, batch=128, group=7, length=2000, experts=1, expert_length=3000)
    assert luffy == pytest.approx(4 * 128 * (7 * 2000 * f(2000) + 3000 * f(3000)))
    # An expert that is as long as a rollout: a group of eight, as in GRPO.
    assert flops.paper_luffy_step(
        QWEN2_5_7B, batch=128, group=7, length=2000, experts=1, expert_length=2000
    ) == pytest.approx(flops.paper_grpo_step(QWEN2_5_7B, batch=128, group=8, mean_length=2000))


MOE = {**QWEN_CONFIG, "moe_intermediate_size": 768, "num_experts": 128, "num_experts_per_tok": 8}


def test_a_mixture_of_experts_counts_the_experts_that_a_token_passes():
    shape = model_shape(MOE)
    assert (shape.ffn, shape.experts) == (8 * 768, 128)
    assert shape == model_shape({k: v for k, v in MOE.items() if k != "num_experts"} | {"num_local_experts": 128})
    assert shape.layer_weights == 3 * 3584 * 8 * 768 + 2 * 3584 * 3584 + 2 * 3584 * 512 + 3584 * 128
    for key, value in (("mlp_only_layers", [0]), ("decoder_sparse_step", 2), ("shared_expert_intermediate_size", 512)):
        with pytest.raises(UserError, match=key):
            model_shape(MOE | {key: value})
