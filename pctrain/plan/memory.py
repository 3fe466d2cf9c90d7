"""Memory of a rank by part and by phase: the fullest moment of the fullest pipeline stage is what must fit."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from math import ceil

from pctrain.config.tree import Config
from pctrain.hf.config import HFConfig
from pctrain.plan.activations import FP32, Activations
from pctrain.plan.gpus import GIB, Gpu
from pctrain.plan.rollouts import Engine
from pctrain.plan.shapes import DTYPE_BYTES, Layout, buffers, chunks

SWAP_BUCKETS = 2 * (512 << 20)  # core/weight_buckets.py: one under way while the other is read
CPU_RUNTIME = 40e6  # what torch maps and makes at its first steps: 30 to 50 MB measured
# Of all else: what glibc keeps of freed tensors (up to 32 MB each) for later. Measured on a lone rank: 1 to 10 %; on one of several, whose
# buffers for the others come and go as well: 7 to 27 %. Nothing where it gives back (MALLOC_MMAP_THRESHOLD_=131072).
CPU_HOLES, CPU_HOLES_OF_SEVERAL = 0.06, 0.18


@dataclass(frozen=True)
class Moment:
    """`parts`: bytes by name."""

    phase: str
    stage: int
    parts: dict[str, float]

    @property
    def total(self) -> float:
        return sum(self.parts.values())


@dataclass(frozen=True)
class Memory:
    moments: list[Moment] = field(repr=False)

    @property
    def peak(self) -> Moment:
        return max(self.moments, key=lambda moment: moment.total)

    def of(self, phase: str) -> Moment:
        return max((moment for moment in self.moments if moment.phase == phase), key=lambda moment: moment.total)


def in_flight(layout: Layout, stage: int, micro_batches: int) -> float:
    """Micro-batches whose activations a stage holds at once, each of all its layers (virtual stages: of a part of them each).

    1F1B: those under way on the stages behind it, and its own; interleaved as megatron-core's warm-up has it.
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
    engine: Engine | None,
    reference: bool,
    offload: bool,
) -> Memory:
    """`tokens`: positions of a micro-batch; `micro_batches` of one update on one data parallel rank; `reserve`: bytes; `engine`: of RL."""
    activations = Activations(hf, config, layout, gpu, tokens, entropy=engine is not None)
    moments = []
    last = layout.parallel.pipeline - 1
    for stage in sorted({0, min(1, last), last}):  # of those between, the first holds most
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
            gathered = (
                SWAP_BUCKETS if layout.parallel.tensor * layout.parallel.pipeline * layout.parallel.expert > 1 else 0
            )
            gathered = min(gathered, 2 * engine.model_bytes)
            waking = min(engine.weights + engine.asleep, engine.awake)  # its weights come first, the cache after them
            moments.append(Moment("swap", stage, {**held, **resident, "engine": waking, "workspace": gathered}))
            moments.append(Moment("rollout", stage, {**held, **resident, "engine": engine.awake}))
    return Memory([_with_holes(moment, cpu_holes(layout.gpus)) for moment in moments] if gpu.is_cpu else moments)


def cpu_holes(ranks: int) -> float:
    return CPU_HOLES if ranks == 1 else CPU_HOLES_OF_SEVERAL


def _with_holes(moment: Moment, share: float) -> Moment:
    return replace(moment, parts={**moment.parts, "reserve": moment.parts["reserve"] + share * moment.total})


def held_always(hf: HFConfig, config: Config, layout: Layout, gpu: Gpu, stage: int, reserve: float) -> dict[str, float]:
    """Weights, float32 gradients, Adam's moments, and in bfloat16 float32 masters: the last two cut over the ranks that hold the same."""
    found = buffers(hf, layout, stage)
    size = DTYPE_BYTES[config.model.dtype]
    return {
        "weights": float(found.elements * size),
        "gradients": float(found.elements * FP32),
        "optimizer": float(found.owned * (2 * FP32 + (FP32 if size < FP32 else 0))),
        "reserve": CPU_RUNTIME if gpu.is_cpu else reserve,
    }


def _update(activations: Activations, layout: Layout, stage: int, hf: HFConfig, micro_batches: int) -> dict[str, float]:
    """The fullest moment of forward and backward passes: at the end of a forward pass, or where the embedding gets its gradient."""
    layers, pipeline = layout.stage_layers(hf.layers)[stage], layout.parallel.pipeline
    one, count = activations.micro_batch(layers), in_flight(layout, stage, micro_batches)
    at_the_end = max(activations.backward_of_layer(), activations.head() if stage == pipeline - 1 else 0.0)
    found = {"activations": one * count, "workspace": at_the_end}
    if stage == 0:
        others = {
            "activations": one * max(0.0, count - 1),
            "workspace": activations.embedding() + activations.backward_of_layer(),
        }
        found = max(found, others, key=lambda parts: sum(parts.values()))
    return found


def gib(value: float) -> str:
    return f"{value / GIB:.1f}" if value >= 10 * GIB else f"{value / GIB:.2f}"
