"""Packing: rows of different lengths become micro-batches of at most `token_budget` tokens for the data parallel ranks.

Every rank calls `pack_rows` with the same rows, computes the same packs from the lengths alone, and reads only the
tokens of its packs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from pctrain.common.errors import UserError
from pctrain.data.rows import Row, RowSet

NO_LABEL = -100
# Pack sizes are multiples of this: matrix products in half precision and in 8 bits need multiples of 16 rows.
MULTIPLE = 16


@dataclass(frozen=True)
class PackShape:
    """The requirements of a parallel layout on its packs."""

    align: int = 1  # every sequence takes a multiple of this many positions
    multiple: int = MULTIPLE  # every pack has a multiple of this many positions
    equal: bool = False  # all packs of a batch have one size, as the stages of a pipeline exchange tensors of one size
    # The sequence length at which attention costs as much as the linear layers (ModelShape.balanced_length).
    balanced_length: float = 4096.0


@dataclass(frozen=True)
class Pack:
    """One micro-batch of T <= token_budget positions.

    A padding pack has no sequence: its `cu_seqlens` is [0] and all its weights are 0.
    """

    tokens: torch.Tensor  # int64 [T]; 0 on padding
    labels: torch.Tensor  # int64 [T]; already shifted; -100 means none (the last position of a sequence, and padding)
    weights: torch.Tensor  # float32 [T]; loss weight of the prediction of `labels`
    position_ids: torch.Tensor  # int64 [T]; restart at 0 in every sequence; 0 on padding
    padding: torch.Tensor  # bool [T]; True where no sequence has a token
    cu_seqlens: torch.Tensor  # int32 [n + 1]; the start of every sequence, and the end of the last one
    streams: dict[str, torch.Tensor]  # {name: float32 [T]}, aligned with `labels`
    rows: list[int]  # [n]; the index of each sequence among the packed rows


@dataclass(frozen=True)
class PackedBatch:
    """The packs of this rank (every rank has the same number), and totals over all ranks."""

    packs: list[Pack]
    loss_tokens: float  # sum of all weights; metrics are divided by it
    denominator: float  # loss and gradients are divided by it; `loss_tokens` unless the caller gave another value
    tokens: int  # real tokens
    positions: int  # positions of all packs, including padding
    sequences: int


def pack_rows(
    rows: Sequence[Row] | RowSet,
    token_budget: int,
    *,
    dp_rank: int = 0,
    dp_size: int = 1,
    shape: PackShape = PackShape(),
    denominator: float | None = None,
) -> PackedBatch:
    """Pack rows into micro-batches of at most `token_budget` positions and return the batch of rank `dp_rank`.

    The number of packs is what first-fit decreasing needs, rounded up to a multiple of `dp_size`. Rows are placed so
    that the packs cost about the same. A pack is only as long as its content (a multiple of `shape.multiple`, at most
    the budget), because padding costs as much as tokens.

    Raises:
        UserError: a row is longer than the token budget.
        ValueError: there are no rows, a row is empty or has a weight on its first token, or rows have different
            streams.
    """
    rows = rows if isinstance(rows, RowSet) else RowSet.of(rows)
    _check_lengths(rows.lengths, token_budget)
    room = -(-rows.lengths // shape.align) * shape.align  # positions that each sequence takes
    packs_by_rank = plan(room, token_budget, dp_size, shape.balanced_length)
    sizes = [[_pack_size(room[pack], token_budget, shape) for pack in packs] for packs in packs_by_rank]
    if shape.equal:
        largest = max(size for rank_sizes in sizes for size in rank_sizes)
        sizes = [[largest] * len(rank_sizes) for rank_sizes in sizes]
    packs = [
        _build([rows[i] for i in pack], pack, room[pack], size, rows.streams)
        for pack, size in zip(packs_by_rank[dp_rank], sizes[dp_rank], strict=True)
    ]
    denominator = rows.loss_tokens if denominator is None else denominator
    return PackedBatch(packs, rows.loss_tokens, denominator, int(rows.lengths.sum()), sum(map(sum, sizes)), len(rows))


def _pack_size(room: np.ndarray, token_budget: int, shape: PackShape) -> int:
    multiples = max(1, -(-int(room.sum()) // shape.multiple))
    return min(token_budget, multiples * shape.multiple)


def plan(room: np.ndarray, token_budget: int, ranks: int, balanced_length: float) -> list[list[list[int]]]:
    """Return the packs of each rank; a pack is a list of row indices. Every rank has the same number of packs.

    A rank has its share of the packs that first-fit decreasing fills. Rows are spread over the ranks, and on each rank
    over its packs, by their FLOPs, including attention's square. If they do not fit that way, the packs of first-fit
    decreasing are dealt.

    Args:
        room: int64 [n], the positions that each row takes.
        token_budget: the maximum number of positions of a pack.
        ranks: the number of data parallel ranks.
        balanced_length: see PackShape.
    """
    first_fit = first_fit_decreasing(room, token_budget)
    packs_per_rank = -(-len(first_fit) // ranks)
    cost = room + room.astype(np.float64) ** 2 / balanced_length
    rows_by_rank = _spread_evenly(room, cost, packs_per_rank * token_budget, ranks)
    if rows_by_rank is not None:
        packed = _pack_each_rank(rows_by_rank, room, cost, token_budget, packs_per_rank)
        if packed is not None:
            return packed
    packs = first_fit + [[] for _ in range(packs_per_rank * ranks - len(first_fit))]
    dealt = deal([float(cost[pack].sum()) for pack in packs], ranks)
    return [[packs[i] for i in indices] for indices in dealt]


def _pack_each_rank(
    rows_by_rank: list[list[int]], room: np.ndarray, cost: np.ndarray, token_budget: int, count: int
) -> list[list[list[int]]] | None:
    """Return `count` packs for each rank, or None if the rows of a rank need more packs."""
    packed = []
    for rows in rows_by_rank:
        packs = _pack_one_rank(np.array(rows, dtype=np.int64), room, cost, token_budget, count)
        if packs is None:
            return None
        packed.append(packs)
    return packed


def _pack_one_rank(
    rows: np.ndarray, room: np.ndarray, cost: np.ndarray, token_budget: int, count: int
) -> list[list[int]] | None:
    """Return `count` packs of the given rows, or None if the rows need more packs.

    The packs are even in cost if possible, otherwise even in tokens, otherwise as first-fit decreasing fills them.
    """
    room, cost = room[rows], cost[rows]
    packs = _spread_evenly(room, cost, token_budget, count) or _spread_evenly(room, room, token_budget, count)
    if packs is None:
        packs = first_fit_decreasing(room, token_budget)
        packs += [[] for _ in range(count - len(packs))]
    return [rows[pack].tolist() for pack in packs] if len(packs) == count else None


def first_fit_decreasing(lengths: np.ndarray, token_budget: int) -> list[list[int]]:
    """Return the row indices of each pack.

    The longest row is placed first (ties in order); each goes into the first pack with room.
    """
    room = np.full(len(lengths), token_budget, dtype=np.int64)
    packs: list[list[int]] = []
    for index in np.argsort(-lengths, kind="stable").tolist():
        length = lengths[index]
        pack = int(np.argmax(room[: len(packs) + 1] >= length))  # the pack at the end is untouched, so one always fits
        if pack == len(packs):
            packs.append([])
        packs[pack].append(index)
        room[pack] -= length
    return packs


def _spread_evenly(room: np.ndarray, cost: np.ndarray, capacity: int, count: int) -> list[list[int]] | None:
    """Return `count` lists of rows of even cost, none above its capacity, or None if a row does not fit.

    The longest row is placed first; each goes to the cheapest list that has room.
    """
    left, totals = np.full(count, capacity, dtype=np.int64), np.zeros(count)
    lists: list[list[int]] = [[] for _ in range(count)]
    for index in np.argsort(-room, kind="stable").tolist():
        fits = left >= room[index]
        if not fits.any():
            return None
        cheapest = int(np.argmin(np.where(fits, totals, np.inf)))
        lists[cheapest].append(index)
        left[cheapest] -= room[index]
        totals[cheapest] += cost[index]
    return lists


def deal(costs: Sequence[float], ranks: int) -> list[list[int]]:
    """Return the pack indices of each rank, ascending; each rank gets n / ranks packs.

    The most expensive pack is dealt first; each goes to the cheapest rank that has fewer than its number of packs.
    """
    packs_per_rank = -(-len(costs) // ranks)
    dealt: list[list[int]] = [[] for _ in range(ranks)]
    totals = [0.0] * ranks
    for pack in sorted(range(len(costs)), key=lambda i: (-costs[i], i)):
        rank = min((r for r in range(ranks) if len(dealt[r]) < packs_per_rank), key=lambda r: (totals[r], r))
        dealt[rank].append(pack)
        totals[rank] += costs[pack]
    return [sorted(indices) for indices in dealt]


def _build(rows: Sequence[Row], indices: list[int], room: np.ndarray, size: int, names: Sequence[str]) -> Pack:
    """Build one pack of `size` positions.

    Args:
        rows: the n rows of the pack.
        indices: the index of each row in the batch.
        room: int64 [n], the positions that each row takes.
        size: the number of positions, including padding.
        names: the names of the streams.
    """
    bounds = np.concatenate([[0], np.cumsum(room)])
    tokens = np.zeros(size, np.int64)
    labels = np.full(size, NO_LABEL, np.int64)
    weights = np.zeros(size, np.float32)
    positions = np.zeros(size, np.int64)
    padding = np.ones(size, bool)
    streams = {name: np.zeros(size, np.float32) for name in names}
    if rows:
        _check_rows(rows, indices, names)
        lengths = np.array([len(row) for row in rows], dtype=np.int64)
        position = np.arange(lengths.sum()) - np.repeat(np.cumsum(lengths) - lengths, lengths)
        at = np.repeat(bounds[:-1], lengths) + position
        tokens[at] = np.concatenate([row.tokens for row in rows])
        positions[at] = position
        padding[at] = False
        # Token i is predicted at position i - 1, so everything moves one to the left. Nothing predicts a first token,
        # and the last position of a sequence predicts nothing.
        predicted = position > 0
        before = at[predicted] - 1
        labels[before] = tokens[before + 1]
        shifted = [
            (weights, [row.weights for row in rows]),
            *((streams[name], [row.streams[name] for row in rows]) for name in names),
        ]
        for target, values in shifted:
            target[before] = np.concatenate(values)[predicted]
    return Pack(
        torch.from_numpy(tokens),
        torch.from_numpy(labels),
        torch.from_numpy(weights),
        torch.from_numpy(positions),
        torch.from_numpy(padding),
        torch.from_numpy(bounds.astype(np.int32)),
        {name: torch.from_numpy(values) for name, values in streams.items()},
        list(indices),
    )


def _check_lengths(lengths: np.ndarray, token_budget: int) -> None:
    if not len(lengths):
        raise ValueError("there are no rows to pack")
    if not lengths.min():
        raise ValueError(f"row {int(lengths.argmin())} is empty")
    if lengths.max() > token_budget:
        raise UserError(
            f"a sequence of {lengths.max()} tokens does not fit into the token budget of {token_budget}. "
            "Raise token_budget of its section, or allow only shorter prompts and responses."
        )


def _check_rows(rows: Sequence[Row], indices: list[int], names: Sequence[str]) -> None:
    for row, index in zip(rows, indices, strict=True):
        if row.weights[0] != 0:
            raise ValueError(f"row {index} has a weight on its first token, which nothing predicts")
        if set(row.streams) != set(names):
            raise ValueError(f"row {index} has the streams {sorted(row.streams)}, the first row has {sorted(names)}")
