"""Turn a config and a number of GPUs into ranked layouts."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from functools import cached_property
from math import floor, log

from pctrain.common.errors import UserError
from pctrain.config.check import check_combinations
from pctrain.config.tree import Config
from pctrain.hf.config import HFConfig
from pctrain.plan.gpus import GIB, Gpu, find
from pctrain.plan.layouts import candidates, limits, problem
from pctrain.plan.memory import Memory, memory
from pctrain.plan.options import PlanOptions
from pctrain.plan.rollouts import EngineMemory, engine
from pctrain.plan.shapes import Layout, hf_config
from pctrain.plan.speed import Speed, speed
from pctrain.plan.work import Work, work
from pctrain.run.config_file import Kind

EQUAL = 1.05  # step times within this factor count as equal: the estimates are no better
MORE_GPUS = 64  # largest multiple of the GPUs that is tried if nothing fits


@dataclass(frozen=True)
class Plan:
    """One layout of a config, with its memory and time. `context` is the engine's longest sequence, in tokens."""

    config: Config
    layout: Layout
    gpu: Gpu
    context: int
    memory: Memory
    speed: Speed
    engine: EngineMemory | None

    @property
    def share(self) -> float:
        """Return the share of the GPU's memory that is used at the fullest moment."""
        return self.memory.peak.total / self.gpu.memory

    @property
    def starts(self) -> bool:
        """Return whether vLLM would start: its cache must hold one sequence of its whole context."""
        return self.engine is None or self.engine.tokens >= self.context

    @property
    def fits(self) -> bool:
        """Return whether the layout can run."""
        return self.share <= 1 and self.starts

    @property
    def ways(self) -> list[str]:
        """Return how it splits the model and the sequences: TP4, PP2, ..."""
        par = self.layout.parallel
        sizes = {"TP": par.tensor, "PP": par.pipeline, "VP": par.virtual_pipeline, "CP": par.context, "EP": par.expert}
        return [f"{name}{size}" for name, size in sizes.items() if size > 1]

    @property
    def name(self) -> str:
        """Return its name, such as TP4 DP2."""
        return " ".join([*self.ways, f"DP{self.layout.data}"])


def _rank(plan: Plan) -> tuple[bool, float, int, float]:
    if not plan.fits:
        return True, plan.share, len(plan.ways), plan.speed.seconds
    return False, floor(log(plan.speed.seconds) / log(EQUAL)), len(plan.ways), plan.speed.seconds


@dataclass(frozen=True)
class Planner:
    """A config on a kind of GPU. `pinned` are keys of its layout that stay as they are."""

    config: Config
    options: PlanOptions
    pinned: frozenset[str]
    gpu: Gpu

    @classmethod
    def of(cls, config: Config, options: PlanOptions, pinned: Collection[str]) -> Planner:
        """Return the planner of a call. UserError for an unknown kind of GPU."""
        return cls(config, options, frozenset(pinned), find(options.gpu, options.gpus))

    @cached_property
    def hf(self) -> HFConfig:
        """Return the sizes of the model."""
        return hf_config(self.config)

    @cached_property
    def kind(self) -> Kind:
        """Return what is planned: rl if the config sets rl.* and no sft.*, unless --kind says it."""
        if self.options.kind is not None:
            return self.options.kind
        default = Config()
        return "rl" if self.config.rl != default.rl and self.config.sft == default.sft else "sft"

    @cached_property
    def work(self) -> Work:
        """Return the work of one step."""
        return work(self.kind, self.config, self.hf, self.options)

    def plan(self, config: Config, gpus: int | None = None) -> Plan:
        """Return what a config needs at its layout on `gpus` GPUs; default: as many as were given."""
        hf = self.hf
        gpu = self.gpu
        options = self.options
        layout = Layout(config.parallel, gpus or options.gpus)
        step = work(self.kind, config, hf, options)
        sampler = engine(hf, config, gpu) if self.kind == "rl" else None
        timing = speed(hf, config, layout, gpu, step, sampler, mfu=options.mfu, per_node=options.gpus_per_node)
        footprint = memory(
            hf,
            config,
            layout,
            gpu,
            step,
            micro_batches=timing.micro_batches,
            reserve=options.reserve * GIB,
            engine=sampler,
            per_node=options.gpus_per_node,
        )
        return Plan(config, layout, gpu, config.longest_rollout(hf.context), footprint, timing, sampler)

    def plans(self, gpus: int | None = None) -> list[Plan]:
        """Return every layout that passes the checks, best first.

        Layouts that fit come first: the fastest, and of equally fast ones (EQUAL) the simplest. The others follow by
        how much memory they lack.

        Raises:
            UserError: no layout passes the checks; the message says what each key may be.
        """
        gpus = gpus or self.options.gpus
        plans: list[Plan] = []
        for candidate in candidates(self.config, self.hf, gpus, self.kind, self.pinned, self.gpu.is_cpu):
            plans += self._with_recomputation(candidate, gpus)
        if not plans:
            raise UserError(self._no_layout(gpus))
        return sorted(plans, key=_rank)

    def _with_recomputation(self, config: Config, gpus: int) -> Iterator[Plan]:
        """Yield plans with more and more recomputation until one fits: less recomputation is faster."""
        pinned = "parallel.recompute" in self.pinned
        for recompute in (config.parallel.recompute,) if pinned else ("none", "selective", "full"):
            parallel = config.parallel.model_copy(update={"recompute": recompute})
            plan = self.plan(config.model_copy(update={"parallel": parallel}), gpus)
            yield plan
            if plan.fits:
                return

    def as_configured(self) -> Plan | str:
        """Return the config's own layout on these GPUs, or why it does not run on them."""
        return problem(self.config, self.options.gpus, self.kind) or self.plan(self.config)

    def _no_layout(self, gpus: int) -> str:
        whole = "\n".join(f"  {limit}" for limit in limits(self.config, self.hf, gpus, self.kind))
        kept = f" with {', '.join(sorted(self.pinned))} as given" if self.pinned else ""
        try:
            check_combinations(self.config, gpus, ("model", "parallel", "rollout", self.kind))
            why = ""
        except UserError as error:
            why = f"\n{error}"
        return f"no layout of {gpus} GPUs passes the checks{kept}:{why}\nwhat divides:\n{whole}"

    def ways_out(self, best: Plan) -> list[str]:
        """Return the single changes that would make something fit."""
        ways = []
        smaller = self._with_smaller_packs(best)
        if smaller is not None:
            ways.append(f"shorter packs: --{self.kind}.token_budget={smaller} (a sequence must fit into one)")
        gpus = self.options.gpus
        for times in (2**n for n in range(1, MORE_GPUS.bit_length())):
            try:
                first = self.plans(gpus * times)[0]
            except UserError:
                continue
            if first.fits:
                ways.append(f"more GPUs: {gpus * times} ({first.name}, recompute {first.layout.parallel.recompute})")
                break
        if best.config.model.dtype == "float32" and not best.gpu.is_cpu:
            model = best.config.model.model_copy(update={"dtype": "bfloat16"})
            if self._fits(best.config.model_copy(update={"model": model})):
                ways.append("half the bytes of weights and activations: --model.dtype=bfloat16")
        if self.kind == "rl":
            ways += self._with_reference_on_host(best) + self._with_another_engine(best)
        return ways

    def _fits(self, config: Config) -> bool:
        return problem(config, self.options.gpus, self.kind) is None and self.plan(config).fits

    def _with_reference_on_host(self, best: Plan) -> list[str]:
        rl = best.config.rl.model_copy(update={"reference_offload": True})
        has_reference = "reference" in self.work.passes and not best.config.rl.reference_offload
        if has_reference and not best.gpu.is_cpu and self._fits(best.config.model_copy(update={"rl": rl})):
            return ["the reference in host memory between its passes: --rl.reference_offload=true"]
        return []

    def _with_smaller_packs(self, best: Plan) -> int | None:
        section = getattr(best.config, self.kind)
        budget = section.token_budget // 2
        while budget >= 256:
            smaller = best.config.model_copy(update={self.kind: section.model_copy(update={"token_budget": budget})})
            if self._fits(smaller):
                return budget
            budget //= 2
        return None

    def _with_another_engine(self, best: Plan) -> list[str]:
        for share in (0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1):
            rollout = best.config.rollout.model_copy(update={"gpu_memory": share})
            if self.plan(best.config.model_copy(update={"rollout": rollout})).fits:
                return [f"another share for the engine: --rollout.gpu_memory={share}"]
        return []
