"""Memory of a rank by part and by phase. The fullest moment of the fullest pipeline stage must fit."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from math import ceil

from pctrain.config.tree import Config
from pctrain.hf.config import HFConfig
from pctrain.plan.activations import FP32, Activations
from pctrain.plan.gpus import GIB, Gpu
from pctrain.plan.host import HostMemory, host_memory, save_bytes
from pctrain.plan.rollouts import EngineMemory
from pctrain.plan.shapes import DTYPE_BYTES, Layout, buffers, chunks
from pctrain.plan.work import Work

BUCKET = 512 << 20  # core/weight_buckets.py, BUCKET_BYTES
# Rows of a weight update's verification: rollout/worker.py, VERIFY_PROMPTS, and one long prompt; and the tokens sampled
# after each (rollout/engine.py, VERIFY_TOKENS).
VERIFY_ROWS, VERIFY_TOKENS = 5, 8
CPU_RUNTIME = 40e6  # what torch maps at its first steps: 30 to 50 MB measured
# What glibc keeps of freed tensors (up to 32 MB each), as a share of all else. Measured: 1 to 10% on a lone rank; 7 to
# 27% on one of several ranks, whose exchange buffers come and go as well. None with MALLOC_MMAP_THRESHOLD_=131072.
CPU_HOLES, CPU_HOLES_OF_SEVERAL = 0.06, 0.18


PHASES = ("load", "swap", "verify", "rollout", "logprob", "reference", "update", "save")  # in the order of a run
# In the order of the table. `stream` is a weight update's buckets and what vLLM loads them into; `checkpoint` is what a
# save gathers (on a CPU; on a GPU it is host memory).
PARTS = (
    "weights",
    "gradients",
    "optimizer",
    "reference",
    "engine",
    "activations",
    "logits",
    "workspace",
    "stream",
    "checkpoint",
    "reserve",
)


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
    """All moments of a layout, and what it needs of the machines' own memory."""

    moments: list[Moment] = field(repr=False)
    host: HostMemory

    @property
    def peak(self) -> Moment:
        """Return the fullest moment."""
        return max(self.moments, key=lambda moment: moment.total)

    @property
    def phases(self) -> dict[str, Moment]:
        """Return the fullest stage of every phase, in the order of a run."""
        return {name: self.of(name) for name in dict.fromkeys(moment.phase for moment in self.moments)}

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
    work: Work,
    *,
    micro_batches: int,
    reserve: float,
    engine: EngineMemory | None,
    per_node: int,
) -> Memory:
    """Return the memory of a layout, phase by phase.

    * load: the learner is built; its parameters exist twice until megatron-core has moved them into its buffer.
    * swap, verify, rollout: the weight update, its verification's forward pass next to the awake engine, sampling.
    * logprob, reference: passes without gradients, if the algorithm needs them.
    * update: forward, backward and optimizer. SFT has load, update and save only.
    * save: a checkpoint. On a CPU its copies are in the same memory.

    Args:
        hf: sizes of the model.
        config: the config.
        layout: the layout.
        gpu: the kind of GPU.
        work: the work of a step.
        micro_batches: micro-batches of one update on one data parallel rank.
        reserve: bytes for CUDA and libraries.
        engine: the engine of RL.
        per_node: ranks of a machine.
    """
    moments = []
    last = layout.parallel.pipeline - 1
    for stage in sorted({0, min(1, last), last}):  # of the middle stages, the first holds most
        rank = _Rank(hf, config, layout, gpu, work, stage, reserve, engine)
        moments += rank.moments(micro_batches)
    moments.sort(key=lambda moment: PHASES.index(moment.phase))
    if gpu.is_cpu:
        moments = [_with_holes(moment, cpu_holes(layout.gpus)) for moment in moments]
    return Memory(moments, host_memory(hf, config, layout, gpu, work, per_node))


class _Rank:
    """The memory of a rank of one pipeline stage."""

    def __init__(
        self,
        hf: HFConfig,
        config: Config,
        layout: Layout,
        gpu: Gpu,
        work: Work,
        stage: int,
        reserve: float,
        engine: EngineMemory | None,
    ):
        self.hf, self.config, self.layout, self.gpu, self.work, self.stage = hf, config, layout, gpu, work, stage
        self.engine = engine
        self.held = held_always(hf, config, layout, gpu, stage, reserve)
        self.activations = self._of(work.micro_batch(layout.data))
        count = sum(chunk.parameters for chunk in chunks(hf, layout, stage))
        self.parameters = float(count * DTYPE_BYTES[config.model.dtype])
        self.reference = {"reference": self.parameters} if "reference" in work.passes else {}
        offloaded = config.rl.reference_offload and not gpu.is_cpu
        self.resident = {**self.held, **({} if offloaded else self.reference)}

    def _of(self, tokens: int) -> Activations:
        return Activations(self.hf, self.config, self.layout, self.gpu, tokens, entropy=self.engine is not None)

    def moments(self, micro_batches: int) -> list[Moment]:
        """Return the moments of all phases."""
        asleep = {} if self.engine is None else {"engine": self.engine.asleep}
        phases = {
            "load": {**self._load(), **asleep},
            "update": {**self.resident, **asleep, **self._update(micro_batches)},
            "save": {**self.resident, **asleep, **self._save()},
        }
        if self.engine is not None:
            phases |= self._engine_phases(self.engine)
        if "logprob" in self.work.passes:
            phases["logprob"] = {**self.resident, **asleep, **self.activations.forward_alone(entropy=True)}
        if self.reference:
            alone = self.activations.forward_alone(entropy=False)
            phases["reference"] = {**self.held, **self.reference, **asleep, **alone}
        return [Moment(phase, self.stage, parts) for phase, parts in phases.items()]

    def _load(self) -> dict[str, float]:
        """Return the fuller moment while the learner is built: parameters exist twice, or the optimizer copies them.

        Its float32 masters are made of copies in the model's dtype, one parameter at a time. Float32 models have none.
        """
        built = {name: self.held[name] for name in ("weights", "gradients", "reserve")}
        size = DTYPE_BYTES[self.config.model.dtype]
        modules = chunks(self.hf, self.layout, self.stage)
        largest = max(max((*module.dense, *module.expert), default=0) for module in modules)
        masters = FP32 * buffers(self.hf, self.layout, self.stage).owned if size < FP32 else 0
        moments: list[dict[str, float]] = [
            {**built, "workspace": self.parameters},
            {**built, "optimizer": float(masters), "workspace": float(largest * size)},
        ]
        return max(moments, key=lambda parts: sum(parts.values()))

    def _engine_phases(self, engine: EngineMemory) -> dict[str, dict[str, float]]:
        """Return the phases in which the engine is awake, in whole or in part.

        Its weights wake first, then the cache, each after the allocator gave its free blocks back. The verification
        runs between two passes of the engine.
        """
        waking = min(engine.weights + engine.asleep, engine.awake)
        verify = self._of(self._verified_tokens()).forward_alone(entropy=False)
        return {
            "swap": {**self.resident, "engine": waking, "stream": self._stream(engine)},
            "verify": {**self.resident, "engine": engine.idle, **verify},
            "rollout": {**self.resident, "engine": engine.awake},
        }

    def _verified_tokens(self) -> int:
        """Return the tokens of a verification's pack: every engine's rows are shared by the data parallel ranks."""
        engines = self.layout.gpus // self.config.rollout.tensor
        rows = ceil(VERIFY_ROWS * engines / self.layout.data)
        budget = max(self.config.rl.token_budget, self.config.sft.token_budget)
        return min(budget, rows * (self.work.prompt + VERIFY_TOKENS))

    def _stream(self, engine: EngineMemory) -> float:
        """Return what a weight update holds next to both models.

        The stream: two buckets of full tensors, one with this rank's part still next to it (core/weight_buckets.py); on
        a rank that holds everything, none. A matrix larger than a bucket is alone in one. The engine: the tensors of a
        module, and the module before it is copied into the captured graphs' memory (vllm 0.32.0,
        model_executor/model_loader/reload/layerwise.py; all experts of a layer are one module).
        """
        hf, par, size = self.hf, self.layout.parallel, DTYPE_BYTES[self.config.model.dtype]
        ffn = 2 * hf.ffn if hf.experts is None else 3 * hf.experts.ffn * hf.experts.count
        module = max(hf.vocab, ffn) * hf.hidden * size
        loading = module * (1 + 1 / self.config.rollout.tensor)
        if par.tensor * par.pipeline * par.expert == 1:
            return loading
        width = hf.ffn if hf.experts is None else hf.experts.ffn
        largest = max(BUCKET, max(hf.vocab, 2 * width) * hf.hidden * size)
        own = largest / par.tensor if par.tensor > 1 else 0.0
        return min(largest + own + BUCKET, 2 * engine.model_bytes) + loading

    def _save(self) -> dict[str, float]:
        """Return what a save adds: nothing on a GPU, where it gathers over gloo in host memory."""
        return {"checkpoint": save_bytes(self.hf, self.layout, self.stage)} if self.gpu.is_cpu else {}

    def _update(self, micro_batches: int) -> dict[str, float]:
        """Return the fullest moment of an update: the end of a forward pass, or the embedding's gradient."""
        activations, pipeline = self.activations, self.layout.parallel.pipeline
        layers = self.layout.stage_layers(self.hf.layers)[self.stage]
        per_micro_batch = activations.micro_batch(layers)
        count = in_flight(self.layout, self.stage, micro_batches)
        backward = activations.backward_of_layer()
        moments = [{"activations": per_micro_batch * count, "workspace": backward}]
        if self.stage == pipeline - 1:
            logits = activations.logits(activations.entropy)
            head = {"logits": logits, "workspace": activations.head()}
            moments.append({"activations": per_micro_batch * count, **head})
        if self.stage == 0:
            others = per_micro_batch * max(0.0, count - 1)
            moments.append({"activations": others, "workspace": activations.embedding() + backward})
        return max(moments, key=lambda parts: sum(parts.values()))


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


def gib(value: float) -> str:
    """Return bytes as GiB, for a message."""
    return f"{value / GIB:.1f}" if value >= 10 * GIB else f"{value / GIB:.2f}"
