"""Activation memory: what a micro-batch keeps for its backward pass, and temporary tensors. Bytes on one rank.

The counts follow what autograd saves in our layers (core/layers) and in Transformer Engine's.
tests/plan/test_plan_activations.py compares them with the tensors that the real model saves, and
tests/plan/test_plan_memory.py with the resident memory of real steps.
"""

from __future__ import annotations

from math import ceil

from pctrain.config.tree import Config, ModelConfig
from pctrain.hf.config import HFConfig
from pctrain.plan.gpus import Gpu
from pctrain.plan.shapes import DTYPE_BYTES, Layout, largest_matrix

# One chunk of logits: pctrain_kernels/head.py, GPU_LOGITS_BYTES and CPU_LOGITS_BYTES.
GPU_LOGITS, CPU_LOGITS = 5 * 2**29, 2**25
FP32 = 4


def layer_spec(model: ModelConfig, gpu: Gpu) -> str:
    """Return `te`, `torch-varlen` or `torch`: the layer spec of the plan (core/layers/spec.py, `choose_spec`).

    `auto` on a GPU is `te` for bfloat16, as if Transformer Engine were installed, and `torch` for float32.
    """
    if model.spec != "auto":
        return model.spec
    return "te" if not gpu.is_cpu and model.dtype == "bfloat16" else "torch"


class Activations:
    """The activations of a model at a layout.

    `tokens` is the positions of a micro-batch, over all context parallel ranks. `entropy` says whether the loss reads
    the entropy, as in RL.
    """

    def __init__(self, hf: HFConfig, config: Config, layout: Layout, gpu: Gpu, tokens: int, entropy: bool):
        self.hf = hf
        self.layout = layout
        self.gpu = gpu
        self.entropy = entropy
        self.par = par = layout.parallel
        self.size = DTYPE_BYTES[config.model.dtype]
        self.spec = layer_spec(config.model, gpu)
        self.tokens = ceil(tokens / par.context)
        self.queries, self.keys = hf.heads * hf.head_dim / par.tensor, hf.kv_heads * hf.head_dim / par.tensor
        # Only sequence parallelism shards norms and the residual stream over the tensor parallel ranks.
        self.stream_tokens = self.tokens / (par.tensor if par.sequence_parallel else 1)
        self.stream = self.stream_tokens * hf.hidden * self.size

    def layer(self) -> float:
        """Return what one layer keeps, with the recomputation of the layout."""
        return self.stream if self.par.recompute == "full" else self._whole_layer()

    def _whole_layer(self) -> float:
        """Return two norms, attention and feed-forward."""
        return 2 * self._norm() + self.attention() + self.feed_forward()

    def _norm(self) -> float:
        """Return the input of a norm, its float32 scale, and its output, which the product after it saves.

        On a CPU the torch norm composes bfloat16 of float32 copies: of the input and of the normed input.
        """
        composed = self.gpu.is_cpu and self.size < FP32
        return self.stream * (1 + 2 * FP32 / self.size if composed else 2) + self.stream_tokens * FP32

    def attention(self) -> float:
        """Return what the attention of a layer saves.

        * `te` and `torch-varlen` (flash attention): rotated queries and keys, a copy of the values, the output, and the
          float32 log-sum-exp of every head. Keys and values of grouped queries are not repeated.
        * `torch` (scaled_dot_product_attention): without a copy of the values, which are a view and keep the whole
          projection alive. In packs of several lengths the inputs are copied instead, and the output once more.
        * Norms of queries and keys keep their inputs: the queries and the projection. On a CPU they keep the normed
          ones, for bfloat16 as two float32 copies.
        * Recomputed (selective): the inputs and the output. `te` rotates before, so its inputs are rotated queries and
          keys and the values, which keep the projection; the others keep the queries and the projection. Flash
          attention saves less than that without recomputation.
        """
        hf, tensor = self.hf, self.par.tensor
        projected = self.queries + 2 * self.keys
        norms = FP32 * (hf.heads + hf.kv_heads) / tensor if hf.qk_norm else 0.0
        if self.par.recompute == "selective":
            elements = projected + 2 * self.queries + (self.keys if self.spec == "te" or hf.qk_norm else 0)
            elements += self.queries if hf.qk_norm else 0
            return self.tokens * (elements * self.size + norms)
        elements = (3 if self.spec == "torch" else 2) * (self.queries + self.keys)
        if hf.qk_norm and self.gpu.is_cpu:
            elements += (self.queries + self.keys) * (1 if self.size == FP32 else 2 * FP32 / self.size)
        elif hf.qk_norm:  # nothing else keeps the projection then
            elements += self.queries + projected - (self.keys if self.spec == "torch" else 0)
        return self.tokens * (elements * self.size + FP32 * hf.heads / tensor + norms)

    def feed_forward(self) -> float:
        """Return what the feed-forward of a layer saves: for each position, or routed copy of one, multiples of F.

        A dense layer keeps gate and up, and their product; on a CPU also the activated gate (core/layers/swiglu.py).
        Experts keep as much with megatron-core's fused activation, which `te` and `torch-varlen` have. In the torch
        spec they keep six: also the activated gate, a copy of up, and the product before and after it is weighted.
        """
        hf, tensor = self.hf, self.par.tensor
        if hf.experts is None:
            return self.tokens * self.size * (4 if self.gpu.is_cpu else 3) * hf.ffn / tensor
        routed = self.tokens * hf.experts.per_token
        # Logits and probabilities in float32, the map of routed tokens; chosen experts, their weights, and the order.
        router = self.stream_tokens * (hf.experts.count * (FP32 + 1) + hf.experts.per_token * 24)
        width = (6 if self.spec == "torch" else 3) * hf.experts.ffn / tensor
        return routed * self.size * (width + hf.hidden) + router

    def micro_batch(self, layers: int) -> float:
        """Return what `layers` layers of a stage keep of a micro-batch; in a pipeline with its input and output."""
        between = 2 * self.stream if self.par.pipeline > 1 else 0.0
        return layers * self.layer() + between + self.angles()

    def angles(self) -> float:
        """Return the cosines and sines of every position and head, made once per pack (torch specs only)."""
        return 0.0 if self.spec == "te" else 2 * self.tokens * self.size * (self.queries + self.keys)

    def backward_of_layer(self) -> float:
        """Return the temporary gradients through the widest block, and the layer again if it is recomputed."""
        hf, tensor = self.hf, self.par.tensor
        width = hf.ffn if hf.experts is None else hf.experts.ffn * hf.experts.per_token
        gradients = self.tokens * self.size * (3 * width / tensor + 3 * hf.hidden)
        again = self._recomputed()
        # megatron-core gives autograd an empty gradient of each matrix. On a CPU, memory never written is not resident.
        dummy = 0.0 if self.gpu.is_cpu else largest_matrix(hf, self.par) * self.size
        return gradients + again + dummy

    def _recomputed(self) -> float:
        """Return what exists twice while the backward pass recomputes a layer."""
        if self.par.recompute == "full":
            return self._whole_layer()
        attention = self.tokens * self.size * 2 * (self.queries + self.keys)
        return attention if self.par.recompute == "selective" else 0.0

    def _chunk_rows(self) -> int:
        """Return the rows of a chunk of logits: equal pieces of at most the budget (pctrain_kernels/head.py)."""
        budget = CPU_LOGITS if self.gpu.is_cpu else GPU_LOGITS
        most = max(1, budget // (FP32 * self._columns()))
        return ceil(self.tokens / ceil(self.tokens / most))

    def _columns(self) -> int:
        return self.hf.padded_vocab(self.par.tensor) // self.par.tensor

    def logits(self, entropy: bool) -> float:
        """Return the buffers of a chunk of logits: the Triton kernels need one, torch a second for the entropy."""
        return float(self._chunk_rows() * self._columns() * FP32 * (2 if self.gpu.is_cpu and entropy else 1))

    def head(self) -> float:
        """Return what the last stage's head needs next to its logits: hidden states, their gradient, and the weight's.

        The final norm's input and output, and the gradient in float32 and in the model's dtype; of a chunk's rows, a
        copy of the states and of their gradient. The weight's gradient goes into its float32 buffer; autograd gets an
        empty one.
        """
        hf = self.hf
        hidden = self.tokens * hf.hidden * (FP32 + 3 * self.size)
        rows = self._chunk_rows() * hf.hidden * (FP32 + self.size)
        weight = 0.0 if self.gpu.is_cpu and not hf.tied else self.embedding()
        return hidden + rows + weight

    def embedding(self) -> float:
        """Return the first stage's gradient of the embedding, before it is added to the buffer."""
        return float(self._columns() * self.hf.hidden * self.size)

    def forward_alone(self, entropy: bool) -> dict[str, float]:
        """Return the parts of a pass without gradients: its widest layer, or its head with a chunk of logits."""
        hf, tensor = self.hf, self.par.tensor
        width = hf.ffn if hf.experts is None else hf.experts.ffn * hf.experts.per_token
        layer = self.tokens * self.size * (4 * width / tensor + 4 * hf.hidden)
        hidden, logits = 2 * self.tokens * hf.hidden * self.size, self.logits(entropy)
        if layer > hidden + logits:
            return {"workspace": layer + self.angles()}
        return {"logits": logits, "workspace": hidden + self.angles()}
