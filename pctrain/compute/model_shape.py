"""The sizes of a decoder-only transformer that its FLOPs depend on, without NumPy: config checks read them too."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ModelShape:
    """The sizes of a decoder-only transformer with gated feed-forward blocks and grouped-query attention.

    All are counts. In a mixture of experts a token passes only some experts: `ffn` is the width of these together, and
    `experts` is the number that the router chooses from (0: dense).
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

    @property
    def query_width(self) -> int:
        """Width of all queries together."""
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
        """Sequence length, in tokens, at which causal attention costs as many FLOPs as all linear layers.

        `flops.exact_forward` counts both.
        """
        return (self.layers * self.layer_weights + self.vocab * self.hidden) / (self.layers * self.query_width)

    @property
    def parameters(self) -> int:
        """Matrix weights that a token passes, and the embedding, which counts once if it is tied to the head.

        Norms and biases are left out.
        """
        return self.layers * self.layer_weights + (1 if self.tied else 2) * self.vocab * self.hidden


# The model of the curves published with arXiv 2512.11470.
QWEN2_5_7B = ModelShape(layers=28, hidden=3584, ffn=18944, heads=28, kv_heads=4, head_dim=128, vocab=152064)
