"""Training compute, counted twice: by the paper's formulas (arXiv 2512.11470, appendix E), which give the x of every fit, and exactly.

"FLOPs" here are floating point operations (a multiply-add is two). One EFLOP is 1e18. `S` is the mean length of a sequence, prompt and
response together, in tokens. All functions take plain numbers and return floats.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from pctrain.errors import UserError

EFLOP = 1e18

# A backward pass costs two forward passes: one for the gradients of the inputs, one for those of the weights.
TRAINING_UNITS = 3.0


@dataclass(frozen=True)
class ModelShape:
    """What the FLOPs of a decoder-only transformer (gated feed-forward, grouped-query attention) depend on. All sizes are counts."""

    layers: int
    hidden: int
    ffn: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    tied: bool = False

    @classmethod
    def from_hf_config(cls, config: Mapping, source: str = "config.json") -> ModelShape:
        """Shape from the fields of a Hugging Face `config.json` (Llama, Qwen2, Qwen3, Mistral). `source` names the file in errors."""
        heads = _positive_int(config, "num_attention_heads", source)
        hidden = _positive_int(config, "hidden_size", source)
        return cls(
            layers=_positive_int(config, "num_hidden_layers", source),
            hidden=hidden,
            ffn=_positive_int(config, "intermediate_size", source),
            heads=heads,
            kv_heads=_positive_int(config, "num_key_value_heads", source, default=heads),
            head_dim=_positive_int(config, "head_dim", source, default=hidden // heads),
            vocab=_positive_int(config, "vocab_size", source),
            tied=bool(config.get("tie_word_embeddings", False)),
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
        """Matrix weights of one layer: gate, up and down; query and output; key and value. Norms and biases are left out."""
        return 3 * self.hidden * self.ffn + 2 * self.hidden * self.query_width + 2 * self.hidden * self.kv_width

    @property
    def balanced_length(self) -> float:
        """Length of a sequence, tokens, at which causal attention costs as many FLOPs as all linear layers (see `exact_forward`)."""
        return (self.layers * self.layer_weights + self.vocab * self.hidden) / (self.layers * self.query_width)

    @property
    def parameters(self) -> int:
        """Matrix weights of the model (norms and biases left out); a tied embedding counts once."""
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


def paper_dapo_step(shape: ModelShape, *, rounds: float, batch_generated: float, batch_trained: float, group: float,
                    mean_length: float) -> float:
    """FLOPs of a DAPO step: (K B_gen + 3 B_train) G S f, with K sampling rounds of B_gen prompts and B_train prompts trained on."""
    prompts = rounds * batch_generated + TRAINING_UNITS * batch_trained
    return prompts * group * mean_length * paper_forward_per_token(shape, mean_length)


def exact_forward(shape: ModelShape, *, tokens: float, mean_length: float) -> float:
    """Forward FLOPs of `tokens` tokens in sequences of `mean_length`, each matrix product counted once.

    Position i of a sequence attends to i keys, so scores and values of a sequence cost 2 * 2 * S (S + 1) / 2 * query width a layer.
    The embedding is a look-up and free; every token passes the head; norms, softmax and activations (below 1 %) are left out.
    With sequences of unequal length the attention term is a lower bound, as the mean of squares exceeds the square of the mean.
    """
    s = shape
    per_token = 2.0 * (s.layers * s.layer_weights + s.vocab * s.hidden)
    attention_per_token = 2.0 * s.layers * s.query_width * (mean_length + 1.0)
    return tokens * (per_token + attention_per_token)


def _positive_int(config: Mapping, key: str, source: str, default: int | None = None) -> int:
    value = config.get(key)
    if value is None:
        value = default
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise UserError(f"{source}: `{key}` must be a whole number above 0, found {value!r}; give the config.json of a Llama-like model")
    return value
