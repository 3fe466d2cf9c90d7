"""Training compute, counted twice: by the paper's formulas (arXiv 2512.11470, appendix E), which give the x of every fit, and exactly.

"FLOPs" here are floating point operations (a multiply-add is two). One EFLOP is 1e18. `S` is the mean length of a sequence, prompt and
response together, in tokens. All functions return floats.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike

from pctrain.common.errors import UserError

EFLOP = 1e18
Recompute = Literal["none", "selective", "full"]

# A backward pass costs two forward passes: one for the gradients of the inputs, one for those of the weights.
TRAINING_UNITS = 3.0


@dataclass(frozen=True)
class ModelShape:
    """What the FLOPs of a decoder-only transformer (gated feed-forward, grouped-query attention) depend on. All sizes are counts.

    Of a mixture of experts, what a token passes: `ffn` is the width of its experts together, `experts` those that the router chooses from
    (0: dense).
    """

    layers: int
    hidden: int
    ffn: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    tied: bool = False
    experts: int = 0

    @classmethod
    def from_hf_config(cls, config: Mapping, source: str = "config.json") -> ModelShape:
        """Shape from the fields of a Hugging Face `config.json` (Llama, Qwen2, Qwen3, Qwen3-MoE, Mistral).

        `source` names the file in errors. UserError: a size is missing, or some layers have experts and others have none.
        """
        heads = _positive_int(config, "num_attention_heads", source)
        hidden = _positive_int(config, "hidden_size", source)
        ffn, experts = _feed_forward(config, source)
        return cls(
            layers=_positive_int(config, "num_hidden_layers", source),
            hidden=hidden,
            ffn=ffn,
            heads=heads,
            kv_heads=_positive_int(config, "num_key_value_heads", source, default=heads),
            head_dim=_positive_int(config, "head_dim", source, default=hidden // heads),
            vocab=_positive_int(config, "vocab_size", source),
            tied=bool(config.get("tie_word_embeddings", False)),
            experts=experts,
        )

    @property
    def query_width(self) -> int:
        return self.heads * self.head_dim

    @property
    def kv_width(self) -> int:
        """D_kv: width of all keys (or of all values) together."""
        return self.kv_heads * self.head_dim

    @property
    def layer_weights(self) -> int:
        """Matrix weights that a token passes in one layer: gate, up and down; query and output; key and value; router.

        Norms and biases are left out.
        """
        attention = 2 * self.hidden * self.query_width + 2 * self.hidden * self.kv_width
        return 3 * self.hidden * self.ffn + attention + self.hidden * self.experts

    @property
    def balanced_length(self) -> float:
        """Length of a sequence, tokens, at which causal attention costs as many FLOPs as all linear layers (see `exact_forward`)."""
        return (self.layers * self.layer_weights + self.vocab * self.hidden) / (self.layers * self.query_width)

    @property
    def parameters(self) -> int:
        """Matrix weights that a token passes (norms and biases left out), and the embedding; tied, it counts once."""
        return self.layers * self.layer_weights + (1 if self.tied else 2) * self.vocab * self.hidden


# The model of the published curves.
QWEN2_5_7B = ModelShape(layers=28, hidden=3584, ffn=18944, heads=28, kv_heads=4, head_dim=128, vocab=152064)


def paper_forward_per_token(shape: ModelShape, mean_length: float) -> float:
    """f(S) = 2 [L (3 H F + 2 H (H + D_kv)) + 2 V H] + 4 S L H: the paper's forward FLOPs of one token.

    As published: 2 V H counts embedding and head alike, attention is not halved for causality, the query width is taken as H.
    """
    s = shape
    linear = s.layers * (3 * s.hidden * s.ffn + 2 * s.hidden * (s.hidden + s.kv_width)) + 2 * s.vocab * s.hidden
    return 2.0 * linear + 4.0 * mean_length * s.layers * s.hidden


def paper_sft(shape: ModelShape, *, steps: float, batch: float, mean_length: float) -> float:
    """FLOPs of `steps` SFT steps of `batch` sequences: 3 B S f per step."""
    return steps * TRAINING_UNITS * batch * mean_length * paper_forward_per_token(shape, mean_length)


def paper_grpo_step(shape: ModelShape, *, batch: float, group: float, mean_length: float) -> float:
    """FLOPs of a GRPO step, `batch` prompts x `group` rollouts: 4 B G S f (one forward to sample, three to train)."""
    return (1.0 + TRAINING_UNITS) * batch * group * mean_length * paper_forward_per_token(shape, mean_length)


def paper_dapo_step(
    shape: ModelShape, *, rounds: float, batch_generated: float, batch_trained: float, group: float, mean_length: float
) -> float:
    """FLOPs of a DAPO step: (K B_gen + 3 B_train) G S f, with K sampling rounds of B_gen prompts and B_train prompts trained on."""
    prompts = rounds * batch_generated + TRAINING_UNITS * batch_trained
    return prompts * group * mean_length * paper_forward_per_token(shape, mean_length)


# Where rollouts and expert trajectories differ in length, a token costs the f of its own kind: f(S_on), f(S_off).


def paper_luffy_step(
    shape: ModelShape, *, batch: float, group: float, length: float, experts: float, expert_length: float
) -> float:
    """FLOPs of a LUFFY or SRFT step: 4 [B G S_on + B N S_off] f, with G rollouts and N expert trajectories a prompt."""
    on, off = (paper_forward_per_token(shape, s) * s for s in (length, expert_length))
    return (1.0 + TRAINING_UNITS) * batch * (group * on + experts * off)


def paper_upt_step(
    shape: ModelShape,
    *,
    batch: float,
    group: float,
    length: float,
    trained: float,
    experts: float,
    expert_length: float,
) -> float:
    """FLOPs of a UPT step: [B G S_on + 3 (N_on S_on + N_off S_off)] f; N_on = `trained` rollouts and N_off = `experts` trajectories are
    those of the whole batch that are learnt from."""
    on, off = (paper_forward_per_token(shape, s) * s for s in (length, expert_length))
    return batch * group * on + TRAINING_UNITS * (trained * on + experts * off)


def paper_prefix_rft_step(shape: ModelShape, *, batch: float, group: float, mean_length: float) -> float:
    """FLOPs of a Prefix-RFT step: as GRPO; the length of a rollout takes in the expert's prefix."""
    return paper_grpo_step(shape, batch=batch, group=group, mean_length=mean_length)


def exact_forward(shape: ModelShape, lengths: ArrayLike) -> float:
    """Forward FLOPs of sequences of `lengths` [n] tokens, each matrix product counted once.

    Position i of a sequence attends to i keys, so scores and values of a sequence cost 2 * 2 * S (S + 1) / 2 * query width a layer.
    The embedding is a look-up and free; every token passes the head; norms, softmax and activations (below 1 %) are left out.
    """
    tokens = float(np.sum(lengths, dtype=np.float64))
    return tokens * 2.0 * (shape.layers * shape.layer_weights + shape.vocab * shape.hidden) + _attention(shape, lengths)


def exact_training(shape: ModelShape, lengths: ArrayLike, recompute: Recompute = "none") -> float:
    """FLOPs of forward and backward passes over `lengths` [n] tokens, with what is made again in between (parallel.recompute).

    `full` makes all layers again, not the head; `selective` what is inside attention: scores and values.
    """
    again = 0.0
    if recompute == "full":
        again = 2.0 * float(np.sum(lengths, dtype=np.float64)) * shape.layers * shape.layer_weights + _attention(
            shape, lengths
        )
    elif recompute == "selective":
        again = _attention(shape, lengths)
    return TRAINING_UNITS * exact_forward(shape, lengths) + again


def _attention(shape: ModelShape, lengths: ArrayLike) -> float:
    """Scores and values of all layers, forward, under the causal mask."""
    lengths = np.asarray(lengths, dtype=np.float64)
    return 2.0 * shape.layers * shape.query_width * float((lengths * (lengths + 1.0)).sum())


def _feed_forward(config: Mapping, source: str) -> tuple[int, int]:
    """(width that a token passes, experts of a layer; 0: dense)."""
    if config.get("moe_intermediate_size") is None:
        return _positive_int(config, "intermediate_size", source), 0
    for key, every in (
        ("mlp_only_layers", ([], None)),
        ("decoder_sparse_step", (1, None)),
        ("shared_expert_intermediate_size", (0, None)),
    ):
        if config.get(key) not in every:
            raise UserError(
                f"{source}: `{key}` = {config[key]!r}: FLOPs are counted where every layer has routed experts and no other "
                "feed-forward block; give the curves in EFLOPs that you have counted yourself, and leave the model out"
            )
    # transformers 5 writes num_local_experts for what earlier versions call num_experts.
    experts = _positive_int(
        config, "num_experts" if config.get("num_experts") is not None else "num_local_experts", source
    )
    return _positive_int(config, "num_experts_per_tok", source) * _positive_int(
        config, "moe_intermediate_size", source
    ), experts


def _positive_int(config: Mapping, key: str, source: str, default: int | None = None) -> int:
    value = config.get(key)
    if value is None:
        value = default
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise UserError(
            f"{source}: `{key}` must be a whole number above 0, found {value!r}; give the config.json of a Llama-like model"
        )
    return value
