"""A Hugging Face directory for a model made from scratch: trainer, vLLM and transformers load the same files.

config.json            LlamaForCausalLM of `model.architecture`
tokenizer.model        SentencePiece, trained from the training text
tokenizer.json         the same tokenizer as `tokenizers` reads it, and tokenizer_config.json
model.safetensors      random initial weights, float32
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from pctrain.common.errors import UserError
from pctrain.config.tree import ArchitectureConfig, DataConfig
from pctrain.data.sources import read_records
from pctrain.hf.directory import TOKENIZER_CONFIG
from pctrain.hf.tokenizer import BOS_ID, EOS_ID, Tokenizer, read_tokenizer_config, train_sentencepiece
from pctrain.hf.weight_files import SINGLE
from pctrain.hf.weight_names import EMBEDDING, LM_HEAD

INITIAL_STD = 0.02


def make(folder: Path, architecture: ArchitectureConfig, data: DataConfig, seed: int) -> Path:
    """Make a model of this architecture in `folder`, with a tokenizer trained on `data.train`."""
    texts: list[str] = []
    for source in data.train_sources():
        for record in read_records(source.path, data.fields, need=("response",)):
            texts += [record.question, record.trajectory or ""]
    return make_hf_dir(folder, architecture, texts, vocab_size=data.problems.vocab_size, seed=seed)


def make_hf_dir(
    folder: Path, architecture: ArchitectureConfig, texts: Iterable[str], *, vocab_size: int, seed: int
) -> Path:
    """Write the directory next to `folder` and rename it, so that `folder` is complete or does not exist.

    Args:
        folder: the new directory.
        architecture: sizes of the model.
        texts: prompts and responses that the tokenizer is trained from.
        vocab_size: upper bound of the vocabulary. The model gets exactly the pieces that exist; the trainer pads them.
        seed: of the initial weights.
    Raises:
        UserError: the folder exists and is not empty, or the vocabulary is too small for the text.
    """
    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder} exists already; expected a folder that does not exist yet, or an empty one")
    sentencepiece_model = train_sentencepiece(texts, vocab_size)
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}")
    temporary.mkdir(parents=True)
    try:
        tokenizer = _write_tokenizer(temporary, sentencepiece_model, architecture.context)
        _write_config(temporary, architecture, tokenizer.vocab_size)
        weights = initial_weights(architecture, tokenizer.vocab_size, seed)
        save_file(weights, temporary / SINGLE, metadata={"format": "pt"})  # transformers needs the framework's name
        temporary.rename(folder)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    return folder


def initial_weights(architecture: ArchitectureConfig, vocab_size: int, seed: int) -> dict[str, np.ndarray]:
    """Return float32 tensors by their Hugging Face names, `[out, in]`.

    They are normal with standard deviation 0.02. The projections that write into the residual stream are scaled by
    1 / sqrt(2 x layers), so that its variance at the start does not grow with depth (Radford et al. 2019, section 2.3).
    Norms are 1.
    """
    a = architecture
    rng = np.random.default_rng(seed)
    head = a.hidden // a.heads
    residual_std = INITIAL_STD / (2 * a.layers) ** 0.5

    def normal(rows: int, columns: int, std: float = INITIAL_STD) -> np.ndarray:
        return (rng.standard_normal((rows, columns)) * std).astype(np.float32)

    weights = {EMBEDDING: normal(vocab_size, a.hidden)}
    for layer in range(a.layers):
        name = f"model.layers.{layer}"
        weights |= {
            f"{name}.input_layernorm.weight": np.ones(a.hidden, np.float32),
            f"{name}.self_attn.q_proj.weight": normal(a.heads * head, a.hidden),
            f"{name}.self_attn.k_proj.weight": normal(a.kv_heads * head, a.hidden),
            f"{name}.self_attn.v_proj.weight": normal(a.kv_heads * head, a.hidden),
            f"{name}.self_attn.o_proj.weight": normal(a.hidden, a.heads * head, residual_std),
            f"{name}.post_attention_layernorm.weight": np.ones(a.hidden, np.float32),
            f"{name}.mlp.gate_proj.weight": normal(a.ffn, a.hidden),
            f"{name}.mlp.up_proj.weight": normal(a.ffn, a.hidden),
            f"{name}.mlp.down_proj.weight": normal(a.hidden, a.ffn, residual_std),
        }
    weights["model.norm.weight"] = np.ones(a.hidden, np.float32)
    if not a.tied:
        weights[LM_HEAD] = normal(vocab_size, a.hidden)
    return weights


def _write_tokenizer(folder: Path, sentencepiece_model: bytes, context: int) -> Tokenizer:
    from transformers import LlamaTokenizer  # takes seconds to import (torch)

    (folder / "tokenizer.model").write_bytes(sentencepiece_model)
    converted = LlamaTokenizer.from_pretrained(
        folder, legacy=False, add_prefix_space=False, add_bos_token=False, add_eos_token=False, model_max_length=context
    )
    converted.save_pretrained(folder)
    # save_pretrained lists every added token as special, \boxed{ too. A decoder that follows the list drops the box.
    settings = read_tokenizer_config(folder)
    settings.pop("extra_special_tokens", None)
    (folder / TOKENIZER_CONFIG).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    return Tokenizer(folder)


def _write_config(folder: Path, architecture: ArchitectureConfig, vocab_size: int) -> None:
    from transformers import LlamaConfig

    config = LlamaConfig(
        architectures=["LlamaForCausalLM"],
        vocab_size=vocab_size,
        hidden_size=architecture.hidden,
        intermediate_size=architecture.ffn,
        num_hidden_layers=architecture.layers,
        num_attention_heads=architecture.heads,
        num_key_value_heads=architecture.kv_heads,
        max_position_embeddings=architecture.context,
        tie_word_embeddings=architecture.tied,
        initializer_range=INITIAL_STD,
        bos_token_id=BOS_ID,
        eos_token_id=EOS_ID,
        pad_token_id=None,
        dtype="float32",
    )
    config.save_pretrained(folder)
