"""What a micro-batch keeps for its backward pass, and what is made and thrown away meanwhile. Bytes on one rank.

Counted from what autograd saves of our layers (core/layers.py); tests/plan/test_plan_memory.py holds it against the resident memory of
real steps.
"""

from __future__ import annotations

from math import ceil

from pctrain.config.tree import Config
from pctrain.hf.config import HFConfig
from pctrain.plan.gpus import Gpu
from pctrain.plan.shapes import DTYPE_BYTES, Layout, largest_matrix

# One chunk of logits: pctrain_kernels/head.py, GPU_LOGITS_BYTES and CPU_LOGITS_BYTES.
GPU_LOGITS, CPU_LOGITS = 5 * 2**29, 2**25
FP32 = 4


class Activations:
    """Of a model at a layout, for micro-batches of `tokens` positions (all context parallel ranks together).

    `entropy`: the loss reads it, as RL's does.
    """

    def __init__(self, hf: HFConfig, config: Config, layout: Layout, gpu: Gpu, tokens: int, entropy: bool):
        self.hf, self.layout, self.gpu, self.entropy = hf, layout, gpu, entropy
        self.par = par = layout.parallel
        self.size = DTYPE_BYTES[config.model.dtype]
        self.te = config.model.spec == "te" or (config.model.spec == "auto" and not gpu.is_cpu)
        self.tokens = ceil(tokens / par.context)
        # Norms and the residual stream are cut over the tensor parallel ranks under sequence parallelism alone.
        self.stream = self.tokens * hf.hidden * self.size / (par.tensor if par.sequence_parallel else 1)

    def layer(self) -> float:
        """Kept of one layer, with the recomputation that is set."""
        return self.stream if self.par.recompute == "full" else self._whole_layer()

    def _whole_layer(self) -> float:
        """Two norms, each normed and scaled: four times the stream; attention; feed-forward."""
        hf, tensor = self.hf, self.par.tensor
        queries, keys = hf.heads * hf.head_dim / tensor, hf.kv_heads * hf.head_dim / tensor
        projected, turned = queries + 2 * keys, queries + keys
        # What attention gave, once as it saved it, and in the torch spec once more in the order of the pack, as the next product saved it.
        attended = queries * (1 if self.te else 2)
        if self.par.recompute == "selective":
            attention = projected + queries * 2  # its inputs, the queries by themselves, and its output
        else:
            attention = projected + turned + attended
        if hf.qk_norm:
            attention += turned
        return 4 * self.stream + self.tokens * self.size * attention + self._feed_forward()

    def _feed_forward(self) -> float:
        """Gate and up side by side, the activated gate, their product. Of experts: so many copies of every token, routed there and back."""
        hf, tensor = self.hf, self.par.tensor
        if hf.experts is None:
            return self.tokens * self.size * 4 * hf.ffn / tensor
        routed = self.tokens * hf.experts.per_token
        router = self.tokens * hf.experts.count * (FP32 * 2 + 1) / tensor
        # Put in the order of the experts, given back, put in order again; between ranks, what has come from all of them besides.
        between = tensor * self.par.expert > 1
        copies = hf.hidden * (2 / tensor + 1 + between)
        return routed * self.size * (4 * hf.experts.ffn / tensor + copies) + router

    def micro_batch(self, layers: int) -> float:
        """Kept of one micro-batch by `layers` layers of a stage, its input and output among it where there is a pipeline."""
        between = 2 * self.stream if self.par.pipeline > 1 else 0.0
        return layers * self.layer() + between + self._angles()

    def _angles(self) -> float:
        """Cosines and sines of every position, for queries and keys: made once a pack (the torch specs)."""
        hf = self.hf
        return (
            0.0 if self.te else 2 * self.tokens * self.size * (hf.heads + hf.kv_heads) * hf.head_dim / self.par.tensor
        )

    def backward_of_layer(self) -> float:
        """Made and thrown away: gradients through the widest block, and the layer again where it is recomputed."""
        hf, tensor = self.hf, self.par.tensor
        width = hf.ffn if hf.experts is None else hf.experts.ffn * hf.experts.per_token
        gradients = self.tokens * self.size * (3 * width / tensor + 3 * hf.hidden)
        again = self._whole_layer() if self.par.recompute == "full" else 0.0
        # megatron-core hands autograd an empty gradient of each matrix; memory that is never written is not resident on a CPU.
        dummy = 0.0 if self.gpu.is_cpu else largest_matrix(hf, self.par) * self.size
        return gradients + again + dummy

    def head(self) -> float:
        """Of the last stage: logits of a chunk, gradient of the hidden states, which are gathered under sequence parallelism."""
        hf, tensor = self.hf, self.par.tensor
        rows = hf.padded_vocab(tensor) / tensor
        budget = CPU_LOGITS if self.gpu.is_cpu else GPU_LOGITS
        chunk = min(budget, self.tokens * rows * FP32)
        buffers = 2 if self.gpu.is_cpu and self.entropy else 1
        hidden = (
            self.tokens * hf.hidden * (FP32 + 3 * self.size)
        )  # normed, scaled; the gradient in float32, and in the model's dtype
        weight = (
            0.0 if self.gpu.is_cpu and not hf.tied else rows * hf.hidden * self.size
        )  # gradient that autograd is handed
        return chunk * buffers + hidden + weight

    def embedding(self) -> float:
        """Of the first stage: its gradient, before it is added to the buffer."""
        return self.hf.padded_vocab(self.par.tensor) / self.par.tensor * self.hf.hidden * self.size

    def forward_alone(self) -> float:
        """A pass without gradients."""
        hf, tensor = self.hf, self.par.tensor
        width = hf.ffn if hf.experts is None else hf.experts.ffn * hf.experts.per_token
        return self.tokens * self.size * (4 * width / tensor + 4 * hf.hidden) + self.head()
