"""Seconds of a step by part, from FLOPs, bytes and rates. The plan states every share that is assumed."""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil

import numpy as np

from pctrain.compute import flops
from pctrain.config.tree import Config
from pctrain.hf.config import HFConfig
from pctrain.plan.gpus import Gpu
from pctrain.plan.rollouts import EngineMemory, Rollouts, rollouts
from pctrain.plan.shapes import DTYPE_BYTES, Layout, all_parameters, buffers
from pctrain.plan.traffic import LINK_SHARE, Traffic, traffic
from pctrain.plan.work import Work


@dataclass(frozen=True)
class Speed:
    """The time of a step: `parts` in seconds, `bubble` as the share of time a stage waits, `tokens` trained on."""

    parts: dict[str, float]
    bubble: float
    traffic: list[Traffic]
    flops: float
    tokens: int
    micro_batches: int
    rollouts: Rollouts | None

    @property
    def seconds(self) -> float:
        """Return the time of a step."""
        return sum(self.parts.values())


def speed(
    hf: HFConfig,
    config: Config,
    layout: Layout,
    gpu: Gpu,
    work: Work,
    engine: EngineMemory | None,
    *,
    mfu: float,
    per_node: int,
) -> Speed:
    """Return the time of a step. `mfu` is the share of its peak that a GPU reaches, `per_node` the GPUs of a node."""
    par = layout.parallel
    rate = gpu.flops(config.model.dtype) * mfu
    count = _packs(work, layout)
    training = work.training(hf, par.recompute)
    slowest = layout.gpus * _slowest_stage(hf, layout)
    computing = training / slowest / rate
    bubble = bubble_share(layout, count)
    held = max(
        (buffers(hf, layout, stage) for stage in {0, par.pipeline // 2, par.pipeline - 1}), key=lambda b: b.elements
    )
    sent = traffic(hf, config, layout, gpu, work, held, per_node=per_node, computing=computing, micro_batches=count)
    parts = {
        "compute": computing,
        "bubble": computing * bubble / (1 - bubble),
        "interconnect": sum(transfer.waited for transfer in sent),
        # Reading and writing the shard of masters and moments, reading gradients, writing weights.
        "optimizer": work.updates * (held.owned * 28 + held.elements * 8) / gpu.bandwidth,
    }
    sampled = None
    if engine is not None:
        forward = work.forward(hf, work.sequences) / slowest / rate / (1 - bubble)
        parts |= dict.fromkeys(work.passes, forward)
        prompt = flops.exact_forward(hf.shape, np.array([work.prompt]))
        sampled = rollouts(
            hf,
            config,
            layout,
            gpu,
            engine,
            prompt=work.prompt,
            response=work.response,
            rounds=work.rounds,
            prompts=work.prompts,
            group=work.group,
            mfu=mfu,
            forward_flops=prompt,
        )
        parts["rollout"] = sampled.seconds
        parts["swap"] = _weight_update(hf, config, layout, gpu, per_node)
    return Speed(parts, bubble, sent, training, work.tokens, count, sampled)


def _packs(work: Work, layout: Layout) -> int:
    """Return the micro-batches of an update, a multiple of the stages if they are interleaved."""
    count, par = work.micro_batches(layout.data), layout.parallel
    return ceil(count / par.pipeline) * par.pipeline if par.virtual_pipeline > 1 else count


def bubble_share(layout: Layout, micro_batches: int) -> float:
    """Return (p - 1) / (m v + p - 1) for p stages, m micro-batches, v virtual stages (arXiv 2104.04473, 2.2)."""
    par = layout.parallel
    return (par.pipeline - 1) / (micro_batches * par.virtual_pipeline + par.pipeline - 1)


def _slowest_stage(hf: HFConfig, layout: Layout) -> float:
    """Return the mean work of a stage over that of the slowest. The head is work of the last stage."""
    shape = hf.shape
    stages = [float(count * shape.layer_weights) for count in layout.stage_layers(hf.layers)]
    stages[-1] += shape.vocab * shape.hidden
    return sum(stages) / len(stages) / max(stages)


def _weight_update(hf: HFConfig, config: Config, layout: Layout, gpu: Gpu, per_node: int) -> float:
    """Return the time of a weight update: every rank receives every weight, then copies it."""
    par, whole = layout.parallel, all_parameters(hf) * DTYPE_BYTES[config.model.dtype]
    copied = 3 * whole / gpu.bandwidth
    if par.tensor * par.pipeline * par.expert == 1:
        return copied
    across = par.pipeline > 1 and layout.gpus > per_node
    return copied + whole / ((gpu.network if across else gpu.link) * LINK_SHARE)
