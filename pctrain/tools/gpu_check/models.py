"""Small models as Hugging Face directories without a tokenizer: config.json and random weights.

They need numpy and safetensors alone, where `pctrain.data.scratch_model` also trains a tokenizer.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

STD = 0.02


@dataclass(frozen=True)
class Size:
    """The sizes of a model, by their names in config.json."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int


HUNDRED_MILLION = Size(32000, 768, 2048, 12, 12, 4, 64, 2048)  # 0.12B parameters
SHALLOW = Size(8192, 768, 2048, 4, 12, 4, 64, 2048)  # quick to save
TINY = Size(331, 64, 128, 2, 2, 1, 32, 256)
EXPERTS, PER_TOKEN = 4, 2


def llama(folder: Path, size: Size, seed: int = 0) -> Path:
    """Write a Llama with grouped queries and its own output head, unless it exists."""
    return _write(folder, size, seed, {"architectures": ["LlamaForCausalLM"], "model_type": "llama"}, experts=False)


def mixture(folder: Path, size: Size, seed: int = 0) -> Path:
    """Write a Qwen3-MoE, unless it exists."""
    config = {
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "num_experts": EXPERTS,
        "num_experts_per_tok": PER_TOKEN,
        "moe_intermediate_size": size.intermediate_size // 2,
        "norm_topk_prob": True,
    }
    return _write(folder, size, seed, config, experts=True)


def _write(folder: Path, size: Size, seed: int, config: dict[str, Any], *, experts: bool) -> Path:
    if (folder / "config.json").exists():
        return folder
    from safetensors.numpy import save_file

    folder.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(seed)
    weights = {
        name: np.ones(shape, np.float32)
        if len(shape) == 1
        else random.standard_normal(shape, np.float32) * np.float32(STD)
        for name, shape in _shapes(size, experts).items()
    }
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    common = {"rms_norm_eps": 1e-6, "rope_theta": 10000.0, "hidden_act": "silu", "tie_word_embeddings": False}
    tokens = {"bos_token_id": 1, "eos_token_id": 2, "dtype": "float32"}
    text = json.dumps({**config, **asdict(size), **common, **tokens}, indent=2)
    (folder / "config.json").write_text(text + "\n")  # last: the model is complete
    return folder


def _shapes(size: Size, experts: bool) -> dict[str, tuple[int, ...]]:
    """Return {Hugging Face name: shape} of every weight."""
    hidden, head = size.hidden_size, size.head_dim
    queries, keys = size.num_attention_heads * head, size.num_key_value_heads * head
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (size.vocab_size, hidden)}
    for layer in range(size.num_hidden_layers):
        of_layer: dict[str, tuple[int, ...]] = {
            "input_layernorm": (hidden,),
            "self_attn.q_proj": (queries, hidden),
            "self_attn.k_proj": (keys, hidden),
            "self_attn.v_proj": (keys, hidden),
            "self_attn.o_proj": (hidden, queries),
            "post_attention_layernorm": (hidden,),
        }
        if experts:
            of_layer |= {"self_attn.q_norm": (head,), "self_attn.k_norm": (head,), "mlp.gate": (EXPERTS, hidden)}
        width = size.intermediate_size // 2 if experts else size.intermediate_size
        for prefix in [f"mlp.experts.{i}" for i in range(EXPERTS)] if experts else ["mlp"]:
            of_layer |= {
                f"{prefix}.gate_proj": (width, hidden),
                f"{prefix}.up_proj": (width, hidden),
                f"{prefix}.down_proj": (hidden, width),
            }
        shapes |= {f"model.layers.{layer}.{name}.weight": shape for name, shape in of_layer.items()}
    return shapes | {"model.norm.weight": (hidden,), "lm_head.weight": (size.vocab_size, hidden)}
