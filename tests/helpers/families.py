"""A tiny random model of every supported family, made and saved by transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

COMMON = {
    "vocab_size": 331,
    "hidden_size": 32,
    "intermediate_size": 80,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "eos_token_id": 2,
    "bos_token_id": 1,
    "pad_token_id": None,
    # Large enough that a misplaced matrix moves log-probs by far more than the tolerance.
    "initializer_range": 0.2,
}
# The original context is shorter than the test's, so all three kinds of frequencies occur: kept, interpolated, divided.
_LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 5000.0,
    "factor": 8.0,
    "low_freq_factor": 1.5,
    "high_freq_factor": 3.0,
    "original_max_position_embeddings": 64,
}
_MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "head_dim": 16}

FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama2": ("LlamaForCausalLM", {"tie_word_embeddings": False}),
    "llama3": ("LlamaForCausalLM", {"tie_word_embeddings": True, "rope_parameters": _LLAMA3}),
    "mistral": ("MistralForCausalLM", {"tie_word_embeddings": False, "sliding_window": None, "head_dim": 12}),
    "qwen2": ("Qwen2ForCausalLM", {"tie_word_embeddings": True}),
    "qwen3": ("Qwen3ForCausalLM", {"tie_word_embeddings": True, "head_dim": 16}),
    "qwen3-moe": ("Qwen3MoeForCausalLM", {"tie_word_embeddings": False, "norm_topk_prob": True, **_MOE}),
    "qwen3-moe-raw": ("Qwen3MoeForCausalLM", {"tie_word_embeddings": False, "norm_topk_prob": False, **_MOE}),
}


def make(name: str, folder: Path, *, max_shard_size: str = "50GB") -> Path:
    """Save a model of random weights, also norms and biases: a constant would hide a tensor that is not loaded."""
    import torch
    import transformers

    architecture, own = FAMILIES[name]
    model_class = getattr(transformers, architecture)
    torch.manual_seed(7)
    model = model_class(model_class.config_class(**{**COMMON, **own})).float()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter) * 0.2)
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    return folder
