"""The paper's formulas against the paper's own figures, and the exact counts against sums done by hand."""

import pytest

from pctrain.ceiling import flops
from pctrain.ceiling.flops import EFLOP, QWEN2_5_7B, ModelShape
from pctrain.errors import UserError

QWEN_CONFIG = {
    "num_hidden_layers": 28, "hidden_size": 3584, "intermediate_size": 18944, "num_attention_heads": 28, "num_key_value_heads": 4,
    "vocab_size": 152064, "tie_word_embeddings": False,
}


@pytest.mark.parametrize(("steps", "batch", "mean_length", "published"), [
    (360, 512, 3771, 34.9),  # SFT889K
    (62, 16, 10011, 0.6),  # S1K
    (360, 512, 2217, 19.8),  # Easy102K
    (14080, 512, 3771, 1365.8),
])
def test_sft_compute_equals_the_published_figures(steps, batch, mean_length, published):
    eflops = flops.paper_sft(QWEN2_5_7B, steps=steps, batch=batch, mean_length=mean_length) / EFLOP
    # Published with one decimal, from mean lengths rounded to a token: 14080 steps carry that rounding 39 times further.
    assert eflops == pytest.approx(published, abs=0.05, rel=2e-4)


def test_rl_steps_are_forward_units_of_the_same_formula():
    f = flops.paper_forward_per_token(QWEN2_5_7B, 2000)
    assert flops.paper_grpo_step(QWEN2_5_7B, batch=128, group=8, mean_length=2000) == pytest.approx(4 * 128 * 8 * 2000 * f)
    dapo = flops.paper_dapo_step(QWEN2_5_7B, rounds=2, batch_generated=128, batch_trained=64, group=8, mean_length=2000)
    assert dapo == pytest.approx((2 * 128 + 3 * 64) * 8 * 2000 * f)
    # One round that keeps everything is GRPO.
    assert flops.paper_dapo_step(QWEN2_5_7B, rounds=1, batch_generated=64, batch_trained=64, group=8, mean_length=500) == pytest.approx(
        flops.paper_grpo_step(QWEN2_5_7B, batch=64, group=8, mean_length=500))


def test_shape_from_hf_config():
    assert ModelShape.from_hf_config(QWEN_CONFIG) == QWEN2_5_7B
    assert QWEN2_5_7B.parameters == pytest.approx(7.615e9, rel=1e-3)  # 7.62B; norms and biases are left out
    plain = ModelShape.from_hf_config({k: v for k, v in QWEN_CONFIG.items() if k != "num_key_value_heads"} | {"head_dim": None})
    assert plain.kv_heads == 28 and plain.head_dim == 128  # attention without groups; head_dim by default
    wide = ModelShape.from_hf_config(QWEN_CONFIG | {"head_dim": 256, "tie_word_embeddings": True})
    assert wide.query_width == 28 * 256 and wide.kv_width == 4 * 256
    assert wide.parameters == 28 * wide.layer_weights + 152064 * 3584


@pytest.mark.parametrize("change", [{"hidden_size": None}, {"vocab_size": 0}, {"num_hidden_layers": "28"}, {"intermediate_size": True}])
def test_a_config_without_a_size_names_file_and_key(change):
    with pytest.raises(UserError, match=rf"model/config.json.*{next(iter(change))}"):
        ModelShape.from_hf_config(QWEN_CONFIG | change, "model/config.json")


def test_exact_forward_is_the_sum_over_matrix_products():
    shape = ModelShape(layers=2, hidden=8, ffn=16, heads=4, kv_heads=2, head_dim=3, vocab=10)
    length, q, kv = 5, 12, 6
    products = 0
    for _ in range(length):
        products += 2 * (8 * q + 2 * 8 * kv + q * 8 + 3 * 8 * 16)  # linear: a multiply-add is two; twice for the two layers
        products += 8 * 10  # head
    for position in range(length):
        products += 2 * 2 * q * (position + 1)  # two layers; scores and values over the keys seen so far
    assert flops.exact_forward(shape, tokens=5, mean_length=5) == 2 * products
    assert flops.exact_forward(shape, tokens=15, mean_length=5) == 6 * products
