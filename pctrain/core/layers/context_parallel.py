"""Context parallelism: each rank of a group holds two pieces of every sequence of a pack.

A sequence is cut into 2 x size pieces, and rank r takes piece r and the r-th from the end. Under causal attention an
early piece is cheap and a late one expensive, so this gives all ranks equal work. Transformer Engine's attention and
megatron-core's rotary embedding expect this split of packed sequences (`_get_thd_freqs_on_this_cp_rank`).
"""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from pctrain.common.device import to_device
from pctrain.data.packing import Pack


def alignment(size: int) -> int:
    """Return the number whose multiples the lengths of a pack and of its sequences must be."""
    return 2 * size if size > 1 else 1


def positions(cu_seqlens: torch.Tensor, tokens: int, rank: int, size: int) -> torch.Tensor:
    """Return the positions of the pack that this rank holds, int64 [tokens / size]; padding is cut like a sequence."""
    pieces = []
    for start, end in pairwise([*cu_seqlens.tolist(), tokens]):
        length = (end - start) // (2 * size)
        starts = (start + i * length for i in (rank, 2 * size - 1 - rank))
        pieces += [torch.arange(first, first + length) for first in starts]
    return torch.cat(pieces)


def shard(pack: Pack) -> Pack:
    """Return this rank's positions of a pack; `cu_seqlens` stays that of the whole pack, as attention expects."""
    size, rank = parallel_state.get_context_parallel_world_size(), parallel_state.get_context_parallel_rank()
    if size == 1:
        return pack
    mine = positions(pack.cu_seqlens, len(pack.tokens), rank, size)
    return replace(
        pack,
        tokens=pack.tokens[mine],
        labels=pack.labels[mine],
        weights=pack.weights[mine],
        position_ids=pack.position_ids[mine],
        padding=pack.padding[mine],
        streams={name: stream[mine] for name, stream in pack.streams.items()},
    )


def gather(values: torch.Tensor, cu_seqlens: torch.Tensor) -> torch.Tensor:
    """Return the whole pack's values [T] on every rank from this rank's [T / size].

    Collective over the context parallel group.
    """
    group = parallel_state.get_context_parallel_group()
    if group.size() == 1:
        return values
    shares = [torch.empty_like(values) for _ in range(group.size())]
    dist.all_gather(shares, values.contiguous(), group=group)
    whole = values.new_empty(len(values) * group.size())
    places = to_device([positions(cu_seqlens, len(whole), rank, group.size()) for rank in range(group.size())])
    for place, share in zip(places, shares, strict=True):
        whole[place] = share
    return whole
