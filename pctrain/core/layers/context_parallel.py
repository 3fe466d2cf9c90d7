"""Context parallelism: each rank of a group holds two pieces of every sequence of a pack.

A sequence is cut into 2 x size pieces, and rank r takes piece r and the r-th from the end: under causal attention an early piece is cheap
and a late one dear, so that all ranks get equal work. It is the split that Transformer Engine's attention and megatron-core's rotary
embedding expect of packed sequences (megatron-core's `_get_thd_freqs_on_this_cp_rank`).
"""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from pctrain.data.packing import Pack


def alignment(size: int) -> int:
    """Every sequence of a pack, and the pack, takes a multiple of so many positions."""
    return 2 * size if size > 1 else 1


def positions(cu_seqlens: torch.Tensor, tokens: int, rank: int, size: int) -> torch.Tensor:
    """int64 [tokens / size]: which positions of the pack are this rank's. The padding after the last sequence is cut like one more."""
    bounds = [*cu_seqlens.tolist(), tokens]
    taken = []
    for a, b in zip(bounds[:-1], bounds[1:], strict=True):
        piece = (b - a) // (2 * size)
        taken += [torch.arange(a + i * piece, a + (i + 1) * piece) for i in (rank, 2 * size - 1 - rank)]
    return torch.cat(taken)


def shard(pack: Pack) -> Pack:
    """This rank's positions of a pack; `cu_seqlens` stays that of the whole pack, as attention wants it."""
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
    """This rank's [T / size] of a pack -> all of it, [T], on every rank. Collective over the context parallel group."""
    group = parallel_state.get_context_parallel_group()
    if group.size() == 1:
        return values
    shares = [torch.empty_like(values) for _ in range(group.size())]
    dist.all_gather(shares, values.contiguous(), group=group)
    whole = values.new_empty(len(values) * group.size())
    for rank, share in enumerate(shares):
        whole[positions(cu_seqlens, len(whole), rank, group.size()).to(values.device)] = share
    return whole
