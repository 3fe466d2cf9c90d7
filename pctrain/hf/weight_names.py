"""Names of tensors in Hugging Face directories that several modules ask for."""

from __future__ import annotations

EMBEDDING = "model.embed_tokens.weight"
LM_HEAD = "lm_head.weight"  # left out of the files where it is tied to the embedding


def is_constant(name: str) -> bool:
    """Return whether a tensor is the constant rotary table that old checkpoints store. No learner trains it."""
    return name.endswith("rotary_emb.inv_freq")
