"""The learner's weights under their Hugging Face names, for an engine in the same processes: gathered in flat buckets, ahead of their use.

`weights.export_hf` gathers one parameter at a time and waits for it: right for a file, whose writer must hold little. A swap in every step
pays for that with one latency a parameter. Here the parameters of a bucket travel in one flat buffer, and while the engine loads one
bucket the next one is under way. No more than two buckets are held, never the whole model.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from pctrain.core import weights
from pctrain.core.weights import Unit
from pctrain.distributed.health import watchdog
from pctrain.hf import weight_names
from pctrain.hf.config import HFConfig

# Bytes of a bucket, gathered. Collectives of a few hundred MB run at the bandwidth of the link, and two of them are little beside a model
# that needs sharding (slime's swap of a 30B model in 3 s uses as much).
BUCKET_BYTES = 512 << 20


@dataclass(frozen=True)
class Placed:
    """One parameter in a bucket: `shape` of each tensor parallel rank's part, which begins at `start` of that rank's row."""

    unit: Unit
    shape: torch.Size
    start: int

    @property
    def end(self) -> int:
        return self.start + math.prod(self.shape)


@dataclass(frozen=True)
class Bucket:
    """Parameters that come from the same ranks. `sources`: (group, global rank that sends) of each broadcast, in their order."""

    placed: list[Placed]
    sources: tuple

    @property
    def row(self) -> int:
        """Elements of one tensor parallel rank's part."""
        return self.placed[-1].end


def stream_hf(
    modules: list[torch.nn.Module], hf: HFConfig, te: bool, *, bucket_bytes: int = BUCKET_BYTES
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yields what `weights.export_hf` yields, in its order: (Hugging Face name, full tensor on this rank, never written again).

    Collective over all ranks of a model: all iterate to the end.
    """
    mine = weights.local_parameters(modules)
    tp_group = parallel_state.get_tensor_model_parallel_group()
    routes = weights.routes(set(mine))
    if tp_group.size() == 1 and all(not source for _, source in routes):
        yield from weights.export_hf(modules, hf, te)  # everything is here: nothing travels
        return
    sample = next(iter(mine.values()))
    limit = bucket_bytes // (sample.element_size() * tp_group.size())
    under_way = None
    for bucket in [*_buckets(weights.units(hf, te), tp_group.size(), routes, limit), None]:
        following = None if bucket is None else (bucket, *_send(bucket, mine, tp_group, sample))
        if under_way is not None:
            yield from _unpack(*under_way, hf)
        under_way = following


def _buckets(table: list[Unit], tp: int, routes: list, limit: int) -> Iterator[Bucket]:
    """The table in order, cut where `limit` elements of a row are full (a larger parameter is alone) and where the senders change.

    Collective: the same cuts on every rank. Where the senders change for the ranks of one stage (from a matrix of all to one of an expert
    parallel rank), they may not for those of another, who get both from the same neighbour; cut apart, they would wait for one another.
    """
    came_to = {
        unit.name: tuple((group, source[unit.name]) for group, source in routes if unit.name in source)
        for unit in table
    }
    cuts = {after.name for before, after in pairwise(table) if came_to[before.name] != came_to[after.name]}
    for group, _ in routes:
        by_rank: list = [None] * group.size()
        dist.all_gather_object(by_rank, cuts, group=group)
        cuts = set().union(*by_rank)
    placed: list[Placed] = []
    for unit in table:
        # The layout of a part, from the one table: no rank need hold it to know its shape.
        shape = unit.shard([torch.empty(shape, device="meta") for shape in unit.hf.values()], 0, tp).shape
        if placed and (unit.name in cuts or placed[-1].end + math.prod(shape) > limit):
            yield Bucket(placed, came_to[placed[0].unit.name])
            placed = []
        placed.append(Placed(unit, shape, placed[-1].end if placed else 0))
    yield Bucket(placed, came_to[placed[0].unit.name])


def _send(bucket: Bucket, mine: dict, tp_group, sample: torch.Tensor) -> tuple[torch.Tensor, dist.Work | None]:
    """Starts a bucket on its way -> ([tp, row] that it arrives in, what to wait for).

    First each tensor parallel rank's part goes to the ranks that lack it, then the parts to all: a broadcast of whole tensors would carry
    tp times as much.
    """
    if bucket.placed[0].unit.name in mine:
        row = torch.cat([mine[placed.unit.name].detach().reshape(-1) for placed in bucket.placed])
    else:
        row = sample.new_empty(bucket.row)
    work = None
    for group, source in bucket.sources:
        if work is not None:
            work.wait()
        work = dist.broadcast(row, src=source, group=group, async_op=True)
    if tp_group.size() == 1:
        return row[None], work
    if work is not None:
        work.wait()  # on a GPU the stream waits, not this thread
    parts = row.new_empty(tp_group.size() * bucket.row)
    return parts.view(tp_group.size(), bucket.row), dist.all_gather_into_tensor(
        parts, row, group=tp_group, async_op=True
    )


def _unpack(
    bucket: Bucket, parts: torch.Tensor, work: dist.Work | None, hf: HFConfig
) -> Iterator[tuple[str, torch.Tensor]]:
    if work is not None:
        work.wait()
    for placed in bucket.placed:
        shards = parts[:, placed.start : placed.end].unflatten(1, placed.shape)
        tensors = placed.unit.whole(shards[:1] if placed.unit.replicated else shards)
        for name, full in zip(placed.unit.hf, tensors, strict=True):
            watchdog.beat()
            yield name, full
            if hf.tied and name == weight_names.EMBEDDING:
                yield (
                    weight_names.LM_HEAD,
                    full.clone(),
                )  # an engine that shares the matrix in name only would keep its old head
