"""Tiny Llama models whose log-probs are far from flat, and transformers' fp32 forward pass as the reference."""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch

VOCAB, CONTEXT, EOS = 320, 256, 2


def build(tied: bool, seed: int) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=128,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=tied,
        initializer_range=0.2,
        bos_token_id=1,
        eos_token_id=EOS,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return LlamaForCausalLM(config).float().eval()


def oracle(model: Any, temperature: float) -> Callable[[list[list[int]]], list[np.ndarray]]:
    """Return a transformers model's log-probs in the form of `learner_logprobs`.

    Rows of ids give one float32 [L] each; entry i is for token i, and entry 0 is 0.
    """

    @torch.no_grad()
    def logprobs(rows: list[list[int]]) -> list[np.ndarray]:
        out = []
        for row in rows:
            ids = torch.tensor([row])
            scores = torch.log_softmax(model(ids).logits[0, :-1].float() / temperature, dim=-1)
            out.append(np.concatenate([[0.0], scores.gather(-1, ids[0, 1:, None])[:, 0].numpy()]))
        return out

    return logprobs


def stream(model: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """Return the tensors as the learner's `hf_weights` yields them: full, not sharing storage, the tied head second."""
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and model.config.tie_word_embeddings:
            continue
        yield name, tensor.clone()
        if name == "model.embed_tokens.weight" and model.config.tie_word_embeddings:
            yield "lm_head.weight", tensor.clone()
