"""Models as files, for plans: a config.json alone, and one with random weights."""

from __future__ import annotations

import json
from pathlib import Path

COMMON = {
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e6,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
}
# Over a dense model's keys: 8 experts of which a token takes 2.
SMALL_EXPERTS = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "moe_intermediate_size": 384,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "norm_topk_prob": True,
}
QWEN_7B = {
    "architectures": ["Qwen2ForCausalLM"],
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "vocab_size": 152064,
    "max_position_embeddings": 131072,
}
LLAMA_3B = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 3072,
    "intermediate_size": 8192,
    "num_hidden_layers": 28,
    "num_attention_heads": 24,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
    "tie_word_embeddings": True,
}
QWEN_30B_A3B = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "moe_intermediate_size": 768,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "norm_topk_prob": True,
    "head_dim": 128,
    "num_hidden_layers": 48,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "vocab_size": 151936,
    "max_position_embeddings": 40960,
}
MODELS = {"qwen-7b": QWEN_7B, "llama-3b": LLAMA_3B, "qwen-30b-a3b": QWEN_30B_A3B}


def write_config(folder: Path, shape: dict) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps({**COMMON, **shape}))
    return folder


def write_model(folder: Path, **shape: object) -> Path:
    """Save a Llama with random weights in float32."""
    import torch

    from pctrain.core import weights
    from pctrain.hf import weight_files
    from pctrain.hf.config import HFConfig

    write_config(folder, {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "dtype": "float32", **shape})
    shapes = {name: size for unit in weights.units(HFConfig.read(folder), te=False) for name, size in unit.hf.items()}
    entries = [weight_files.Entry(name, torch.float32, size) for name, size in shapes.items()]
    weight_files.write(
        folder, entries, ((name, torch.randn(size) * 0.02) for name, size in shapes.items()), shard_bytes=10**12
    )
    return folder
