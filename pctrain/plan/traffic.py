"""Bytes that one rank sends in a step, by group, and over which wire.

A ring moves (n - 1) / n of a tensor for an all-gather or a reduce-scatter, and twice that for an all-reduce (as nccl-tests count the bus).
megatron-core orders its ranks tensor, context, data, pipeline (of experts tensor, expert, data): a group lies within a node where its
ranks span no more than one.
"""

from __future__ import annotations

from dataclasses import dataclass

from pctrain.config.tree import Config, ParallelConfig
from pctrain.hf.config import HFConfig
from pctrain.plan.gpus import Gpu
from pctrain.plan.shapes import DTYPE_BYTES, Buffers, Layout
from pctrain.plan.work import Work

LINK_SHARE = 0.7  # of a wire's rate that large collectives reach
CALL = 15e-6  # seconds that any of them takes beside its bytes


@dataclass(frozen=True)
class Traffic:
    """`sent`: bytes a step of one rank; `ranks`: of the group; `hidden`: seconds of it that computing covers."""

    group: str
    ranks: int
    sent: float
    wire: str
    seconds: float
    hidden: float = 0.0

    @property
    def waited(self) -> float:
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
    """Of the updates of a step, on the stage that holds `held`. `computing`: seconds of its forward and backward passes."""
    par, size = layout.parallel, DTYPE_BYTES[config.model.dtype]
    layers = max(layout.stage_layers(hf.layers))
    tokens = work.tokens / layout.data / par.context  # of one rank, in all updates

    packs = micro_batches * work.updates

    def over(group: str, ranks: int, span: int, sent: float, calls: float, hidden: float = 0.0) -> Traffic:
        """`span`: distance in ranks from the first of the group to behind its last."""
        wire, rate = ("within a node", gpu.link) if span <= per_node else ("between nodes", gpu.network)
        return Traffic(group, ranks, sent, wire, sent / (rate * LINK_SHARE) + calls * CALL, hidden)

    found = []
    stream = tokens * hf.hidden * size
    if par.tensor > 1:
        times = _tensor(hf, par, layers)
        found.append(
            over("tensor", par.tensor, par.tensor, times * stream * (par.tensor - 1) / par.tensor, times * packs)
        )
    if par.context > 1:
        keys = tokens * 2 * hf.kv_heads * hf.head_dim / par.tensor * size
        # Keys and values go round the ring forwards, they and their gradients backwards; Transformer Engine does it beside attention.
        steps = layers * (par.context - 1) * (3 + (par.recompute != "none"))
        hidden = computing * attention_share(hf, work)
        found.append(over("context", par.context, par.tensor * par.context, steps * keys, steps * packs, hidden))
    if par.expert > 1:
        routed = stream / par.tensor * hf.experts.per_token * (par.expert - 1) / par.expert
        times = 4 + 2 * (par.recompute == "full")  # there and back, forwards and backwards
        found.append(
            over("expert", par.expert, par.tensor * par.expert, layers * routed * times, layers * times * packs)
        )
    if par.pipeline > 1:
        stride = layout.gpus // par.pipeline
        cut = par.tensor if par.sequence_parallel else 1
        # With virtual stages they travel beside the computing.
        hidden = computing if par.virtual_pipeline > 1 else 0.0
        sends = 2 * par.virtual_pipeline
        found.append(over("pipeline", par.pipeline, 2 * stride, sends * stream / cut, sends * packs, hidden))
    if layout.copies > 1:
        found.append(_data(hf, layout, size, held, work, computing / packs, over))
    return found


def attention_share(hf: HFConfig, work: Work) -> float:
    """Of the FLOPs, those of scores and values: what Transformer Engine's ring of keys and values runs beside."""
    shape = hf.shape
    linear = 2.0 * work.length * (shape.layers * shape.layer_weights + shape.vocab * shape.hidden)
    return 1 - linear / work.forward(hf, 1)


def _tensor(hf: HFConfig, par: ParallelConfig, layers: int) -> float:
    """Passes of the whole stream round the ring, forwards and backwards: of each layer its two blocks, and of the ends."""
    gathered = (
        2 if par.sequence_parallel else 0
    )  # the inputs of both blocks once more, for the gradients of their weights
    blocks = 2 * (2 + 2) + gathered
    again = 4 if par.recompute == "full" else 0
    if hf.experts is not None:
        # The second block's tokens are routed copies, gathered and scattered over the tensor parallel ranks that share each expert.
        blocks = (4 + gathered / 2) + 4 * hf.experts.per_token / par.tensor
        again = (2 + 2 * hf.experts.per_token / par.tensor) if again else 0
    return layers * (blocks + again) + 4


def _data(hf: HFConfig, layout: Layout, size: int, held: Buffers, work: Work, last_backward: float, over) -> Traffic:
    """Gradients in float32 to the rank that owns them, parameters back from it, once an update."""
    dense, expert = layout.copies, layout.expert_copies
    own = held.dense * (dense - 1) / dense + held.expert * (expert - 1) / expert
    span = layout.gpus // layout.parallel.pipeline
    both = over("data", dense, span, own * (4 + size) * work.updates, 2 * work.updates)
    if not layout.parallel.overlap_grad_reduce:
        return both
    # Overlapped with the backward pass of the last micro-batch, two thirds of its time.
    reducing = both.seconds * 4 / (4 + size)
    return Traffic(
        both.group, both.ranks, both.sent, both.wire, both.seconds, min(reducing, last_backward * work.updates * 2 / 3)
    )
