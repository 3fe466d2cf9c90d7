"""Bytes that one rank sends in a step, by group, and over which interconnect.

A ring moves (n - 1) / n of a tensor for an all-gather or a reduce-scatter, and twice that for an all-reduce (the bus
bandwidth of nccl-tests). megatron-core orders its ranks tensor, context, data, pipeline (for experts tensor, expert,
data), so a group is within a node if its ranks span at most one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from pctrain.config.tree import Config, ParallelConfig
from pctrain.hf.config import HFConfig
from pctrain.plan.gpus import Gpu
from pctrain.plan.shapes import DTYPE_BYTES, Buffers, Layout
from pctrain.plan.work import Work

LINK_SHARE = 0.7  # share of an interconnect's rate that large collectives reach
CALL = 15e-6  # seconds that a collective takes besides its bytes


@dataclass(frozen=True)
class Traffic:
    """The data that one rank sends to its group in a step.

    `sent` is in bytes; `hidden` is the seconds that overlap with computing.
    """

    group: str
    ranks: int
    sent: float
    wire: str
    seconds: float
    hidden: float = 0.0

    @property
    def waited(self) -> float:
        """Return the seconds that do not overlap with computing."""
        return max(0.0, self.seconds - self.hidden)


def traffic(
    hf: HFConfig,
    config: Config,
    layout: Layout,
    gpu: Gpu,
    work: Work,
    held: Buffers,
    *,
    per_node: int,
    computing: float,
    micro_batches: int,
) -> list[Traffic]:
    """Return the traffic of a step's updates on the stage with the buffers `held`.

    `computing` is the seconds of its forward and backward passes.
    """
    par, size = layout.parallel, DTYPE_BYTES[config.model.dtype]
    layers = max(layout.stage_layers(hf.layers))
    tokens = work.tokens / layout.data / par.context  # on one rank, in all updates

    packs = micro_batches * work.updates

    def over(group: str, ranks: int, span: int, sent: float, calls: float, hidden: float = 0.0) -> Traffic:
        # `span` is the distance in ranks from the first of the group to one past its last.
        wire, rate = ("within a node", gpu.link) if span <= per_node else ("between nodes", gpu.network)
        return Traffic(group, ranks, sent, wire, sent / (rate * LINK_SHARE) + calls * CALL, hidden)

    transfers = []
    stream = tokens * hf.hidden * size
    if par.tensor > 1:
        times = _tensor(hf, par, layers)
        transfers.append(
            over("tensor", par.tensor, par.tensor, times * stream * (par.tensor - 1) / par.tensor, times * packs)
        )
    if par.context > 1:
        keys = tokens * 2 * hf.kv_heads * hf.head_dim / par.tensor * size
        # Keys and values travel the ring in the forward pass, they and their gradients in the backward pass.
        # Transformer Engine overlaps this with attention.
        steps = layers * (par.context - 1) * (3 + (par.recompute != "none"))
        hidden = computing * attention_share(hf, work)
        transfers.append(over("context", par.context, par.tensor * par.context, steps * keys, steps * packs, hidden))
    if par.expert > 1 and hf.experts is not None:
        routed = stream / par.tensor * hf.experts.per_token * (par.expert - 1) / par.expert
        moves = 4 + 2 * (par.recompute == "full")  # there and back, in the forward and the backward pass
        transfers.append(
            over("expert", par.expert, par.tensor * par.expert, layers * routed * moves, layers * moves * packs)
        )
    if par.pipeline > 1:
        stride = layout.gpus // par.pipeline
        cut = par.tensor if par.sequence_parallel else 1
        # With virtual stages, sending overlaps with computing.
        hidden = computing if par.virtual_pipeline > 1 else 0.0
        sends = 2 * par.virtual_pipeline
        transfers.append(over("pipeline", par.pipeline, 2 * stride, sends * stream / cut, sends * packs, hidden))
    if layout.copies > 1:
        transfers.append(_data(layout, size, held, work, computing / packs, over))
    return transfers


def attention_share(hf: HFConfig, work: Work) -> float:
    """Return the share of FLOPs in scores and values, which overlaps with Transformer Engine's ring."""
    shape = hf.shape
    linear = 2.0 * work.length * (shape.layers * shape.layer_weights + shape.vocab * shape.hidden)
    return 1 - linear / work.forward(hf, 1)


def _tensor(hf: HFConfig, par: ParallelConfig, layers: int) -> float:
    """Return how often the whole stream passes the ring: for the two blocks of each layer, and at the ends."""
    gathered = (
        2.0 if par.sequence_parallel else 0.0
    )  # the inputs of both blocks again, for the gradients of their weights
    blocks = 2 * (2 + 2) + gathered
    again = 4.0 if par.recompute == "full" else 0.0
    if hf.experts is not None:
        # The second block's tokens are routed copies, gathered and scattered over the tensor parallel ranks of each
        # expert.
        blocks = (4 + gathered / 2) + 4 * hf.experts.per_token / par.tensor
        again = (2 + 2 * hf.experts.per_token / par.tensor) if again else 0.0
    return layers * (blocks + again) + 4


def _data(
    layout: Layout, size: int, held: Buffers, work: Work, last_backward: float, over: Callable[..., Traffic]
) -> Traffic:
    """Return float32 gradients to the rank that owns them and parameters back from it, once per update."""
    dense, expert = layout.copies, layout.expert_copies
    own = held.dense * (dense - 1) / dense + held.expert * (expert - 1) / expert
    span = layout.gpus // layout.parallel.pipeline
    both = over("data", dense, span, own * (4 + size) * work.updates, 2 * work.updates)
    if not layout.parallel.overlap_grad_reduce:
        return both
    # Overlaps with the backward pass of the last micro-batch, two thirds of its time.
    reducing = both.seconds * 4 / (4 + size)
    return Traffic(
        both.group, both.ranks, both.sent, both.wire, both.seconds, min(reducing, last_backward * work.updates * 2 / 3)
    )
