"""Seconds of a step, by part, from FLOPs, bytes and rates. Every share that is no measurement is an assumption that the plan states."""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil

import numpy as np

from pctrain.compute import flops
from pctrain.config.tree import Config
from pctrain.hf.config import HFConfig
from pctrain.plan.gpus import Gpu
from pctrain.plan.rollouts import Engine, Rollouts, rollouts
from pctrain.plan.shapes import DTYPE_BYTES, Layout, all_parameters, buffers
from pctrain.plan.traffic import LINK_SHARE, Traffic, traffic
from pctrain.plan.work import Work


@dataclass(frozen=True)
class Speed:
    """`parts`: seconds by name; `bubble`: share of the pipeline's time that a stage waits; `tokens`: trained on, of a step."""

    parts: dict[str, float]
    bubble: float
    traffic: list[Traffic]
    flops: float
    tokens: int
    micro_batches: int
    rollouts: Rollouts | None

    @property
    def seconds(self) -> float:
        return sum(self.parts.values())


def speed(
    hf: HFConfig,
    config: Config,
    layout: Layout,
    gpu: Gpu,
    work: Work,
    engine: Engine | None,
    *,
    mfu: float,
    per_node: int,
) -> Speed:
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
        "wires": sum(one.waited for one in sent),
        # The shard of masters and moments read and written, gradients read, weights written.
        "optimizer": work.updates * (held.owned * 28 + held.elements * 8) / gpu.bandwidth,
    }
    sampled = None
    if engine is not None:
        one = work.forward(hf, work.sequences) / slowest / rate / (1 - bubble)
        for name in work.passes:
            parts[name] = one
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
        parts["swap"] = _swap(hf, config, layout, gpu, per_node)
    return Speed(parts, bubble, sent, training, work.tokens, count, sampled)


def _packs(work: Work, layout: Layout) -> int:
    """Micro-batches of an update; virtual stages take them in groups of as many as there are stages."""
    count, par = work.micro_batches(layout.data), layout.parallel
    return ceil(count / par.pipeline) * par.pipeline if par.virtual_pipeline > 1 else count


def bubble_share(layout: Layout, micro_batches: int) -> float:
    """(p - 1) / (m v + p - 1), of p stages, m micro-batches and v virtual stages (arXiv 2104.04473, 2.2)."""
    par = layout.parallel
    return (par.pipeline - 1) / (micro_batches * par.virtual_pipeline + par.pipeline - 1)


def _slowest_stage(hf: HFConfig, layout: Layout) -> float:
    """Mean work of a stage over that of the slowest: 1 where all are alike. The head is work of the last stage."""
    shape = hf.shape
    stages = [float(count * shape.layer_weights) for count in layout.stage_layers(hf.layers)]
    stages[-1] += shape.vocab * shape.hidden
    return sum(stages) / len(stages) / max(stages)


def _swap(hf: HFConfig, config: Config, layout: Layout, gpu: Gpu, per_node: int) -> float:
    """Every rank gets every weight: from the tensor parallel ranks of its stage, and from the other stages; then it is copied."""
    par, whole = layout.parallel, all_parameters(hf) * DTYPE_BYTES[config.model.dtype]
    copied = 3 * whole / gpu.bandwidth
    if par.tensor * par.pipeline * par.expert == 1:
        return copied
    across = par.pipeline > 1 and layout.gpus > per_node
    return copied + whole / ((gpu.network if across else gpu.link) * LINK_SHARE)
