"""The exact counts equal those of torch in real transformers models, dense and with experts, forward and backward."""

import pytest
import torch
import transformers
from torch.utils.checkpoint import set_checkpoint_early_stop
from torch.utils.flop_counter import FlopCounterMode

from pctrain.compute import flops
from pctrain.compute.model_shape import ModelShape
from pctrain.hf.config import model_shape

SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "vocab_size": 64,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
}
EXPERTS = {
    "moe_intermediate_size": 24,
    "num_experts": 8,
    "num_experts_per_tok": 3,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
}
CONFIGS = {
    "Llama": lambda: transformers.LlamaConfig(**SIZES),
    "Qwen2": lambda: transformers.Qwen2Config(**{k: v for k, v in SIZES.items() if k != "head_dim"}),
    "Qwen3": lambda: transformers.Qwen3Config(**SIZES | {"head_dim": 16}),
    "Qwen3Moe": lambda: transformers.Qwen3MoeConfig(**SIZES | EXPERTS),
}
LENGTHS = [5, 17, 12]


def counted(config, backward: bool, again: bool = False) -> float:
    """Return the FLOPs of the matrix products of one pass over sequences of LENGTHS, without the rotary angles.

    `again`: every layer is recomputed in the backward pass. (torch would stop early, megatron-core does not.)
    """
    config._attn_implementation = "eager"  # whole score matrices: what torch can count
    config._experts_implementation = "eager"
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).train()
    if again:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    total = 0
    for length in LENGTHS:
        with FlopCounterMode(display=False) as counter, set_checkpoint_early_stop(False):
            logits = model(torch.randint(0, 64, (1, length)), use_cache=False).logits
            if backward:
                logits.sum().backward()
        rotary = sum(
            sum(ops.values()) for module, ops in counter.get_flop_counts().items() if module.endswith("rotary_emb")
        )
        total += counter.get_total_flops() - rotary
    return total


def masked(shape: ModelShape) -> float:
    """Return the FLOPs of eager attention above the diagonal: S (S - 1) / 2 keys of scores and of values."""
    return sum(2 * 2 * shape.layers * shape.query_width * length * (length - 1) / 2 for length in LENGTHS)


@pytest.mark.parametrize("name", CONFIGS)
def test_exact_counts_equal_those_of_torch(name):
    config = CONFIGS[name]()
    shape = model_shape(config.to_dict())
    assert flops.exact_forward(shape, LENGTHS) + masked(shape) == counted(config, backward=False)
    assert flops.exact_training(shape, LENGTHS) + 3 * masked(shape) == counted(config, backward=True)


def test_recomputing_all_layers_costs_what_torch_counts():
    config = CONFIGS["Qwen3"]()
    shape = model_shape(config.to_dict())
    assert flops.exact_training(shape, LENGTHS, "full") + 4 * masked(shape) == counted(
        config, backward=True, again=True
    )
