"""The learner's weights under their Hugging Face names, for an engine in the same processes.

`weights.export_hf` gathers one parameter at a time and waits for it, which suits a file: its writer must hold little. A
weight update in every step would pay one latency per parameter. Here the parameters of a bucket travel in one flat
buffer, and the next bucket is on its way while the engine loads this one. At most two buckets are held, never the whole
model.
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

# Bytes of a gathered bucket. Collectives of a few hundred MB run at the bandwidth of the link, and two buckets are
# small next to a model that needs sharding (slime's weight update of a 30B model in 3 s uses as much).
BUCKET_BYTES = 512 << 20


@dataclass(frozen=True)
class Placed:
    """One parameter in a bucket: each tensor parallel rank's part has `shape` and begins at `start` of its row."""

    unit: Unit
    shape: torch.Size
    start: int

    @property
    def end(self) -> int:
        """Offset in the row behind this parameter."""
        return self.start + math.prod(self.shape)


@dataclass(frozen=True)
class Bucket:
    """Parameters that come from the same ranks.

    `sources` holds the group and the sender's global rank of each broadcast, in order.
    """

    placed: list[Placed]
    sources: tuple[tuple[dist.ProcessGroup, int], ...]

    @property
    def row(self) -> int:
        """Number of elements in one tensor parallel rank's part."""
        return self.placed[-1].end


def stream_hf(
    modules: list[torch.nn.Module], hf: HFConfig, te: bool, *, bucket_bytes: int = BUCKET_BYTES
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield (Hugging Face name, full tensor on this rank) in the order of `weights.export_hf`.

    A yielded tensor is never written again. Collective over all ranks of a model: all iterate to the end.
    """
    local = weights.local_parameters(modules)
    tp_group = parallel_state.get_tensor_model_parallel_group()
    routes = weights.routes(set(local))
    if tp_group.size() == 1 and all(not source for _, source in routes):
        yield from weights.export_hf(modules, hf, te)  # this rank holds everything
        return
    sample = next(iter(local.values()))
    limit = bucket_bytes // (sample.element_size() * tp_group.size())
    previous = None
    for bucket in _buckets(weights.units(hf, te), tp_group.size(), routes, limit):
        current = (bucket, *_send(bucket, local, tp_group, sample))
        if previous is not None:
            yield from _unpack(*previous, hf)
        previous = current
    if previous is not None:
        yield from _unpack(*previous, hf)


def _buckets(table: list[Unit], tp: int, routes: list[weights.Route], limit: int) -> Iterator[Bucket]:
    """Cut the table, in order, where a row reaches `limit` elements and where the senders change.

    A parameter larger than that is alone in its bucket. Collective: every rank makes the same cuts. Where the senders
    change for the ranks of one stage (from a matrix that all hold to one of an expert parallel rank), they may not
    change for those of another stage, who get both from the same neighbor. With different cuts they would wait for each
    other.
    """
    senders = {
        unit.name: tuple((group, source[unit.name]) for group, source in routes if unit.name in source)
        for unit in table
    }
    cuts = {after.name for before, after in pairwise(table) if senders[before.name] != senders[after.name]}
    for group, _ in routes:
        if group.size() == 1:  # on a GPU the host would wait to hear from itself
            continue
        by_rank: list = [None] * group.size()
        dist.all_gather_object(by_rank, cuts, group=group)
        cuts = set().union(*by_rank)
    placed: list[Placed] = []
    for unit in table:
        # The table gives the shape of a part, also on ranks that do not hold it.
        shape = unit.shard([torch.empty(shape, device="meta") for shape in unit.hf.values()], 0, tp).shape
        if placed and (unit.name in cuts or placed[-1].end + math.prod(shape) > limit):
            yield Bucket(placed, senders[placed[0].unit.name])
            placed = []
        placed.append(Placed(unit, shape, placed[-1].end if placed else 0))
    yield Bucket(placed, senders[placed[0].unit.name])


def _send(
    bucket: Bucket, local: dict[str, torch.nn.Parameter], tp_group: dist.ProcessGroup, sample: torch.Tensor
) -> tuple[torch.Tensor, dist.Work | None]:
    """Start sending a bucket; return the buffer [tp, row] that it arrives in, and the work to wait for.

    First each tensor parallel rank's part goes to the ranks that lack it, then the parts go to all: a broadcast of
    whole tensors would carry tp times as much.
    """
    if bucket.placed[0].unit.name in local:
        row = torch.cat([local[placed.unit.name].detach().reshape(-1) for placed in bucket.placed])
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
    gathering = dist.all_gather_into_tensor(parts, row, group=tp_group, async_op=True)
    return parts.view(tp_group.size(), bucket.row), gathering


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
                # An engine that shares the matrix in name only would keep its old head.
                yield weight_names.LM_HEAD, full.clone()
