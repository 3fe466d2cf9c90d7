"""Memory of a rank by part and by phase. The fullest moment of the fullest pipeline stage must fit."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from math import ceil

from pctrain.config.tree import Config
from pctrain.hf.config import HFConfig
from pctrain.plan.activations import FP32, Activations
from pctrain.plan.gpus import GIB, Gpu
from pctrain.plan.rollouts import EngineMemory
from pctrain.plan.shapes import DTYPE_BYTES, Layout, buffers, chunks

SWAP_BUCKETS = 2 * (512 << 20)  # core/weight_buckets.py: one is sent while the other is read
CPU_RUNTIME = 40e6  # what torch maps at its first steps: 30 to 50 MB measured
# What glibc keeps of freed tensors (up to 32 MB each), as a share of all else. Measured: 1 to 10% on a lone rank; 7 to
# 27% on one of several ranks, whose exchange buffers come and go as well. None with MALLOC_MMAP_THRESHOLD_=131072.
CPU_HOLES, CPU_HOLES_OF_SEVERAL = 0.06, 0.18


@dataclass(frozen=True)
class Moment:
    """The memory of one phase on one stage; `parts` are bytes by name."""

    phase: str
    stage: int
    parts: dict[str, float]

    @property
    def total(self) -> float:
        """Return the bytes of all parts."""
        return sum(self.parts.values())


@dataclass(frozen=True)
class Memory:
    """All moments of a layout."""

    moments: list[Moment] = field(repr=False)

    @property
    def peak(self) -> Moment:
        """Return the fullest moment."""
        return max(self.moments, key=lambda moment: moment.total)

    def of(self, phase: str) -> Moment:
        """Return the fullest stage of a phase."""
        return max((moment for moment in self.moments if moment.phase == phase), key=lambda moment: moment.total)


def in_flight(layout: Layout, stage: int, micro_batches: int) -> float:
    """Return the micro-batches whose activations a stage holds at once, as multiples of all its layers.

    With 1F1B these are the ones in progress on later stages, and its own. Interleaved stages follow megatron-core's
    warm-up.
    """
    par = layout.parallel
    behind, v = par.pipeline - 1 - stage, par.virtual_pipeline
    if v == 1:
        return min(micro_batches, behind + 1)
    rounded = ceil(micro_batches / par.pipeline) * par.pipeline
    return min(rounded * v, 2 * behind + (v - 1) * par.pipeline + 1) / v


def memory(
    hf: HFConfig,
    config: Config,
    layout: Layout,
    gpu: Gpu,
    *,
    tokens: int,
    micro_batches: int,
    reserve: float,
    engine: EngineMemory | None,
    reference: bool,
    offload: bool,
) -> Memory:
    """Return the memory of a layout.

    Args:
        hf: sizes of the model.
        config: the config.
        layout: the layout.
        gpu: the kind of GPU.
        tokens: positions of a micro-batch.
        micro_batches: micro-batches of one update on one data parallel rank.
        reserve: bytes for CUDA and libraries.
        engine: the engine of RL.
        reference: whether RL keeps reference weights.
        offload: whether these are in host memory between their passes.
    """
    activations = Activations(hf, config, layout, gpu, tokens, entropy=engine is not None)
    moments = []
    last = layout.parallel.pipeline - 1
    for stage in sorted({0, min(1, last), last}):  # of the middle stages, the first holds most
        held = held_always(hf, config, layout, gpu, stage, reserve)
        parameters = sum(chunk.parameters for chunk in chunks(hf, layout, stage)) * DTYPE_BYTES[config.model.dtype]
        kept = {"reference": float(parameters)} if reference else {}
        resident = {} if offload and not gpu.is_cpu else kept
        asleep = {"engine": engine.asleep} if engine is not None else {}
        moments.append(
            Moment(
                "update",
                stage,
                {**held, **resident, **asleep, **_update(activations, layout, stage, hf, micro_batches)},
            )
        )
        if reference:
            moments.append(
                Moment("reference", stage, {**held, **kept, **asleep, "workspace": activations.forward_alone()})
            )
        if engine is not None:
            par = layout.parallel
            is_sharded = par.tensor * par.pipeline * par.expert > 1
            gathered = min(SWAP_BUCKETS, 2 * engine.model_bytes) if is_sharded else 0.0
            waking = min(engine.weights + engine.asleep, engine.awake)  # its weights wake first, then the cache
            moments.append(Moment("swap", stage, {**held, **resident, "engine": waking, "workspace": gathered}))
            moments.append(Moment("rollout", stage, {**held, **resident, "engine": engine.awake}))
    return Memory([_with_holes(moment, cpu_holes(layout.gpus)) for moment in moments] if gpu.is_cpu else moments)


def cpu_holes(ranks: int) -> float:
    """Return the share of memory that glibc keeps of freed tensors."""
    return CPU_HOLES if ranks == 1 else CPU_HOLES_OF_SEVERAL


def _with_holes(moment: Moment, share: float) -> Moment:
    return replace(moment, parts={**moment.parts, "reserve": moment.parts["reserve"] + share * moment.total})


def held_always(hf: HFConfig, config: Config, layout: Layout, gpu: Gpu, stage: int, reserve: float) -> dict[str, float]:
    """Return weights, float32 gradients, and this rank's share of Adam's moments and (for bfloat16) float32 masters."""
    held = buffers(hf, layout, stage)
    size = DTYPE_BYTES[config.model.dtype]
    return {
        "weights": float(held.elements * size),
        "gradients": float(held.elements * FP32),
        "optimizer": float(held.owned * (2 * FP32 + (FP32 if size < FP32 else 0))),
        "reserve": CPU_RUNTIME if gpu.is_cpu else reserve,
    }


def _update(activations: Activations, layout: Layout, stage: int, hf: HFConfig, micro_batches: int) -> dict[str, float]:
    """Return the fullest moment of an update: the end of a forward pass, or the embedding's gradient."""
    layers, pipeline = layout.stage_layers(hf.layers)[stage], layout.parallel.pipeline
    per_micro_batch, count = activations.micro_batch(layers), in_flight(layout, stage, micro_batches)
    workspace = max(activations.backward_of_layer(), activations.head() if stage == pipeline - 1 else 0.0)
    at_forward_end = {"activations": per_micro_batch * count, "workspace": workspace}
    if stage > 0:
        return at_forward_end
    at_embedding = {
        "activations": per_micro_batch * max(0.0, count - 1),
        "workspace": activations.embedding() + activations.backward_of_layer(),
    }
    return max(at_forward_end, at_embedding, key=lambda parts: sum(parts.values()))


def gib(value: float) -> str:
    """Return bytes as GiB, for a message."""
    return f"{value / GIB:.1f}" if value >= 10 * GIB else f"{value / GIB:.2f}"
