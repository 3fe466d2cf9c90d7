"""Host memory that a run needs next to its GPUs': a save, a resume, and a reference that waits there. Bytes."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from pctrain.config.tree import Config
from pctrain.hf.config import HFConfig
from pctrain.plan.gpus import Gpu
from pctrain.plan.shapes import BUCKET, DTYPE_BYTES, Layout, chunks
from pctrain.plan.work import Work

STATE = 3 * 4  # of one parameter: its float32 value and Adam's two moments


@dataclass(frozen=True)
class HostMemory:
    """The most that a save and a resume take on one rank and on one node, and an offloaded reference on one node.

    A save takes `save_rank` on the first rank of a data parallel group, and little on the others. A resume takes
    `load_rank` on every rank: each reads the optimizer's state of its whole group, and keeps its own shard.
    """

    save_rank: float
    save_node: float
    load_rank: float
    load_node: float
    reference_node: float


def host_memory(hf: HFConfig, config: Config, layout: Layout, gpu: Gpu, work: Work, per_node: int) -> HostMemory:
    """Return the host memory of a layout on nodes of `per_node` ranks.

    megatron-core numbers ranks by tensor, context, expert, data and pipeline parallel place, in this order. The first
    ranks of a stage are therefore the first of their data parallel groups.
    """
    size = 0 if gpu.is_cpu else DTYPE_BYTES[config.model.dtype]
    par = layout.parallel
    ranks = layout.gpus // par.pipeline
    tables = [_ByPlace(hf, layout, stage, size) for stage in range(par.pipeline)]
    reference = [0.0] * par.pipeline
    if "reference" in work.passes and config.rl.reference_offload:
        reference = [table.pinned_reference() for table in tables]
    saves, loads, references = [], [], []
    for start in range(0, layout.gpus, per_node):
        node = [divmod(rank, ranks) for rank in range(start, min(start + per_node, layout.gpus))]
        saves.append(sum(tables[stage].save(place) for stage, place in node))
        loads.append(sum(tables[stage].load() for stage, _ in node))
        references.append(sum(reference[stage] for stage, _ in node))
    return HostMemory(
        save_rank=max(table.save(0) for table in tables),
        save_node=max(saves),
        load_rank=max(table.load() for table in tables),
        load_node=max(loads),
        reference_node=max(references),
    )


def save_bytes(hf: HFConfig, layout: Layout, stage: int) -> float:
    """Return the most host memory of a save on the first rank of a stage, without pinned copies of the weights."""
    return _ByPlace(hf, layout, stage, 0).save(0)


class _ByPlace:
    """The host memory of a stage's ranks by their place in it; `size` is the bytes of a pinned weight."""

    def __init__(self, hf: HFConfig, layout: Layout, stage: int, size: int):
        self.layout = layout
        self.size = size
        self.modules = chunks(hf, layout, stage)
        self.overlapped = layout.parallel.overlap_grad_reduce and stage == 0

    def save(self, place: int) -> float:
        """Return the most host memory of a save.

        On the first rank of a data parallel group: the optimizer's state of the whole group, which stays until it is
        written, and pinned copies of its weights. While one bucket of parameters is gathered there, three tensors of
        the bucket's size: what was received, its concatenation, and that of the tensor before. On every rank: its own
        shard of the bucket (megatron-core 0.16.1, optimizer/distrib_optimizer.py, `get_parameter_state_dp_zero`, with
        the flag `distrib_optim_fully_reshardable_mem_efficient`, over gloo and without GPU memory).
        """
        par = self.layout.parallel
        kept, gathering = 0.0, [0.0]
        for of_experts, copies, firsts in (
            (False, self.layout.copies, par.tensor),
            (True, self.layout.expert_copies, par.tensor * par.expert),
        ):
            tensors = [module.expert if of_experts else module.dense for module in self.modules]
            largest = max(self._bucket(index, sum(counts)) for index, counts in enumerate(tensors))
            gathering.append(STATE * largest / copies)
            if place < firsts:
                kept += sum(STATE * sum(counts) + self._pinned(counts) for counts in tensors)
                gathering[-1] += STATE * largest
        return kept + max(gathering)

    def load(self) -> float:
        """Return the most host memory of a resume: the optimizer's state of the whole group, on any of its ranks."""
        return float(STATE * sum(sum(module.dense) + sum(module.expert) for module in self.modules))

    def _bucket(self, index: int, elements: int) -> int:
        """Return the elements of the largest bucket of a buffer: all of them without overlapped reductions."""
        return min(elements, max(BUCKET, 1_000_000 * self.layout.data)) if self.overlapped and index == 0 else elements

    def pinned_reference(self) -> float:
        """Return the pinned copy of all of a rank's weights."""
        return sum(self._pinned(module.dense) + self._pinned(module.expert) for module in self.modules)

    def _pinned(self, counts: Iterable[int]) -> float:
        """Return pinned memory: torch takes the next power of two of a tensor (ATen/core/CachingHostAllocator.h)."""
        return float(sum(1 << (count * self.size - 1).bit_length() for count in counts)) if self.size else 0.0
