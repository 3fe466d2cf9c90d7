"""Collectives of the vocabulary parallel operations."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

# torch 2.13 renamed them and warns of the old names.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor

_largest_shards: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def gather_ranks(mine: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Return every rank's tensor [...] as one [ranks, ...], in rank order."""
    every = mine.new_empty(dist.get_world_size(group), *mine.shape)
    _all_gather(every.flatten(0, 1), mine.contiguous(), group=group)
    return every


def gather_sequence(hidden: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Return the whole sequence [T, H] from every rank's [T / tp, H]."""
    return gather_ranks(hidden, group).flatten(0, 1)


def reduce_hidden_gradient(grad: Tensor, group: dist.ProcessGroup | None, sequence_parallel: bool) -> Tensor:
    """Sum the full precision gradient [T, H] over the vocabulary shards.

    With sequence parallelism the result is this rank's rows [T / tp, H].
    """
    if group is None:
        return grad
    if not sequence_parallel:
        dist.all_reduce(grad, group=group)
        return grad
    mine = grad.unflatten(0, (dist.get_world_size(group), -1))[dist.get_rank(group)] if grad.numel() else grad
    if dist.get_backend(group) == "gloo":  # not every release of it has a reduce-scatter
        dist.all_reduce(grad, group=group)
        return mine
    part = torch.empty_like(mine)
    _reduce_scatter(part, grad, group=group)
    return part


def largest_shard(weight: Tensor, group: dist.ProcessGroup | None) -> int:
    """Return the rows of the group's largest vocabulary shard, from which all ranks derive the same chunk size.

    The first call for a weight makes one all-reduce, which all ranks join; a parameter keeps its identity for a run.
    """
    if group is None:
        return weight.shape[0]
    known = _largest_shards.setdefault(weight, {})
    if group not in known:
        rows = torch.tensor(weight.shape[0], device=weight.device)
        dist.all_reduce(rows, op=dist.ReduceOp.MAX, group=group)
        known[group] = int(rows)
    return known[group]
