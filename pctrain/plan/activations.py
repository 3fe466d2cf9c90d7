"""Activation memory: what a micro-batch keeps for its backward pass, and temporary tensors. Bytes on one rank.

The counts follow what autograd saves in our layers (core/layers). tests/plan/test_plan_memory.py compares them with the
resident memory of real steps.
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
        self.te = config.model.spec == "te" or (config.model.spec == "auto" and not gpu.is_cpu)
        self.tokens = ceil(tokens / par.context)
        # Only sequence parallelism shards norms and the residual stream over the tensor parallel ranks.
        self.stream = self.tokens * hf.hidden * self.size / (par.tensor if par.sequence_parallel else 1)

    def layer(self) -> float:
        """Return what one layer keeps, with the recomputation of the layout."""
        return self.stream if self.par.recompute == "full" else self._whole_layer()

    def _whole_layer(self) -> float:
        """Return two norms, each normed and scaled (four times the stream), attention and feed-forward."""
        hf, tensor = self.hf, self.par.tensor
        queries, keys = hf.heads * hf.head_dim / tensor, hf.kv_heads * hf.head_dim / tensor
        projected, rotated = queries + 2 * keys, queries + keys
        # Attention saves its output. In the torch spec the next product saves it again, in the order of the pack.
        attended = queries * (1 if self.te else 2)
        attention = projected + rotated + attended
        if self.par.recompute == "selective":
            attention = projected + queries * 2  # its inputs, the queries by themselves, and its output
        if hf.qk_norm:
            attention += rotated
        return 4 * self.stream + self.tokens * self.size * attention + self._feed_forward()

    def _feed_forward(self) -> float:
        """Return gate and up, the activated gate, and their product; for experts also the routed copies of tokens."""
        hf, tensor = self.hf, self.par.tensor
        if hf.experts is None:
            return self.tokens * self.size * 4 * hf.ffn / tensor
        routed = self.tokens * hf.experts.per_token
        router = self.tokens * hf.experts.count * (FP32 * 2 + 1) / tensor
        # Tokens in the order of the experts, their results, and both in order again; between ranks also what was
        # received.
        between = tensor * self.par.expert > 1
        copies = hf.hidden * (2 / tensor + 1 + between)
        return routed * self.size * (4 * hf.experts.ffn / tensor + copies) + router

    def micro_batch(self, layers: int) -> float:
        """Return what `layers` layers of a stage keep of a micro-batch; in a pipeline with its input and output."""
        between = 2 * self.stream if self.par.pipeline > 1 else 0.0
        return layers * self.layer() + between + self._angles()

    def _angles(self) -> float:
        """Return the cosines and sines of every position, made once per pack (torch specs only)."""
        hf = self.hf
        return (
            0.0 if self.te else 2 * self.tokens * self.size * (hf.heads + hf.kv_heads) * hf.head_dim / self.par.tensor
        )

    def backward_of_layer(self) -> float:
        """Return the temporary gradients through the widest block, and the layer again if it is recomputed."""
        hf, tensor = self.hf, self.par.tensor
        width = hf.ffn if hf.experts is None else hf.experts.ffn * hf.experts.per_token
        gradients = self.tokens * self.size * (3 * width / tensor + 3 * hf.hidden)
        again = self._whole_layer() if self.par.recompute == "full" else 0.0
        # megatron-core gives autograd an empty gradient of each matrix. On a CPU, memory never written is not resident.
        dummy = 0.0 if self.gpu.is_cpu else largest_matrix(hf, self.par) * self.size
        return gradients + again + dummy

    def head(self) -> float:
        """Return the last stage's chunk of logits and its gradients of the hidden states and of the head."""
        hf, tensor = self.hf, self.par.tensor
        rows = hf.padded_vocab(tensor) / tensor
        budget = CPU_LOGITS if self.gpu.is_cpu else GPU_LOGITS
        chunk = min(budget, self.tokens * rows * FP32)
        buffers = 2 if self.gpu.is_cpu and self.entropy else 1
        # Normed and scaled states, and their gradient in float32 and in the model's dtype.
        hidden = self.tokens * hf.hidden * (FP32 + 3 * self.size)
        # The gradient that autograd is given.
        weight = 0.0 if self.gpu.is_cpu and not hf.tied else rows * hf.hidden * self.size
        return chunk * buffers + hidden + weight

    def embedding(self) -> float:
        """Return the first stage's gradient of the embedding, before it is added to the buffer."""
        return self.hf.padded_vocab(self.par.tensor) / self.par.tensor * self.hf.hidden * self.size

    def forward_alone(self) -> float:
        """Return the memory of a pass without gradients."""
        hf, tensor = self.hf, self.par.tensor
        width = hf.ffn if hf.experts is None else hf.experts.ffn * hf.experts.per_token
        return self.tokens * self.size * (4 * width / tensor + 4 * hf.hidden) + self.head()
