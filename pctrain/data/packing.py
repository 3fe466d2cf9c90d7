"""Rows of different lengths into micro-batches of at most one size, shared out over the data parallel ranks.

Every rank calls `pack_rows` with the same rows, finds the same packs from the lengths alone, and reads the tokens of its own ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from pctrain.common.errors import UserError
from pctrain.data.rows import Row, RowSet

NO_LABEL = -100
# Sizes of packs are multiples of this: matrix products in half precision and in 8 bits want rows by sixteens.
MULTIPLE = 16


@dataclass(frozen=True)
class PackShape:
    """What a layout asks of its packs."""

    align: int = 1  # every sequence takes a multiple of so many positions
    multiple: int = MULTIPLE  # and a pack of so many
    equal: bool = (
        False  # all packs of a batch have one size (the stages of a pipeline send each other tensors of one size)
    )
    # Length of a sequence at which attention costs as much as the linear layers (ModelShape.balanced_length).
    balanced_length: float = 4096.0


@dataclass(frozen=True)
class Pack:
    """One micro-batch of T <= token_budget positions. A padding pack has no sequence: `cu_seqlens` is [0] and all weights are 0."""

    tokens: torch.Tensor  # int64 [T]; 0 on padding
    labels: torch.Tensor  # int64 [T]; already shifted; -100: none (last of a sequence, padding)
    weights: torch.Tensor  # float32 [T]; loss weight of the prediction of `labels`
    position_ids: torch.Tensor  # int64 [T]; restart at 0 in every sequence; 0 on padding
    padding: torch.Tensor  # bool [T]; no token of a sequence lies there
    cu_seqlens: torch.Tensor  # int32 [n + 1]; where sequences begin, and where the last one ends
    streams: dict[str, torch.Tensor]  # {name: float32 [T]}, aligned with `labels`
    rows: list[int]  # [n]; which of the packed rows each sequence is


@dataclass(frozen=True)
class PackedBatch:
    """`packs` are this rank's, equally many on every rank; the other fields are over all ranks."""

    packs: list[Pack]
    loss_tokens: float  # sum of all weights: metrics are divided by it
    denominator: float  # loss and gradients are divided by it: `loss_tokens`, unless the caller gave another one
    tokens: int  # real tokens
    positions: int  # of all packs, padding included
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
    """As few packs as first-fit decreasing needs, a multiple of `dp_size`, filled and dealt so that their costs are even.

    A pack is as long as what is in it (a multiple of `shape.multiple`, at most the budget): padding would cost what tokens cost.

    Raises:
        UserError: a row longer than the token budget.
        ValueError: no rows, an empty row, a weight on a first token, or rows with different streams.
    """
    rows = rows if isinstance(rows, RowSet) else RowSet.of(rows)
    _check(rows.lengths, token_budget)
    room = -(-rows.lengths // shape.align) * shape.align  # positions that each sequence takes
    hands = plan(room, token_budget, dp_size, shape.balanced_length)
    sizes = [
        [min(token_budget, max(1, -(-int(room[pack].sum()) // shape.multiple)) * shape.multiple) for pack in hand]
        for hand in hands
    ]
    if shape.equal:
        largest = max(size for hand in sizes for size in hand)
        sizes = [[largest] * len(hand) for hand in sizes]
    packs = [
        _build([rows[i] for i in pack], pack, room[pack], size, rows.streams)
        for pack, size in zip(hands[dp_rank], sizes[dp_rank], strict=True)
    ]
    denominator = rows.loss_tokens if denominator is None else denominator
    return PackedBatch(packs, rows.loss_tokens, denominator, int(rows.lengths.sum()), sum(map(sum, sizes)), len(rows))


def plan(room: np.ndarray, token_budget: int, ranks: int, balanced_length: float) -> list[list[list[int]]]:
    """`room` [n], the positions of each row -> for each rank its packs, each a list of rows, longest first; equally many on every rank.

    A rank has as many packs as its share of those that first-fit decreasing fills. The rows go to the ranks by their FLOPs, attention's
    square counted, and on a rank to its packs; where they do not fit like that, the packs of first-fit decreasing are dealt out.
    """
    first_fit = first_fit_decreasing(room, token_budget)
    places = -(-len(first_fit) // ranks)
    cost = room + room.astype(np.float64) ** 2 / balanced_length
    hands = _even(room, cost, places * token_budget, ranks)
    if hands is not None:
        packed = [
            _packs_of_one_rank(np.array(hand, dtype=np.int64), room, cost, token_budget, places) for hand in hands
        ]
        if None not in packed:
            return packed
    packs = first_fit + [[] for _ in range(places * ranks - len(first_fit))]
    return [[packs[i] for i in hand] for hand in deal([float(cost[pack].sum()) for pack in packs], ranks)]


def _packs_of_one_rank(
    rows: np.ndarray, room: np.ndarray, cost: np.ndarray, token_budget: int, places: int
) -> list[list[int]] | None:
    """`places` packs of the given rows, even in cost, or else in tokens, or else as they come; None where the rows need more packs."""
    room, cost = room[rows], cost[rows]
    packs = _even(room, cost, token_budget, places) or _even(room, room, token_budget, places)
    if packs is None:
        packs = first_fit_decreasing(room, token_budget)
        packs += [[] for _ in range(places - len(packs))]
    return [rows[pack].tolist() for pack in packs] if len(packs) == places else None


def first_fit_decreasing(lengths: np.ndarray, token_budget: int) -> list[list[int]]:
    """Row indices of each pack. Longest row first (equal ones in their order), each into the first pack with room."""
    room = np.full(len(lengths), token_budget, dtype=np.int64)
    packs: list[list[int]] = []
    for index in np.argsort(-lengths, kind="stable").tolist():
        length = lengths[index]
        pack = int(np.argmax(room[: len(packs) + 1] >= length))  # one untouched pack at the end: there is always a hit
        if pack == len(packs):
            packs.append([])
        packs[pack].append(index)
        room[pack] -= length
    return packs


def _even(room: np.ndarray, cost: np.ndarray, capacity: int, count: int) -> list[list[int]] | None:
    """`count` lists of rows of even cost, none above its capacity: the dearest row first, to the cheapest list that has room.

    None where a row finds no room.
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
    """Pack indices of each rank, ascending: the dearest pack first, to the cheapest rank that has a place left (n / ranks each)."""
    places = -(-len(costs) // ranks)
    hands: list[list[int]] = [[] for _ in range(ranks)]
    totals = [0.0] * ranks
    for pack in sorted(range(len(costs)), key=lambda i: (-costs[i], i)):
        rank = min((r for r in range(ranks) if len(hands[r]) < places), key=lambda r: (totals[r], r))
        hands[rank].append(pack)
        totals[rank] += costs[pack]
    return [sorted(hand) for hand in hands]


def _build(rows: Sequence[Row], indices: list[int], room: np.ndarray, size: int, names: Sequence[str]) -> Pack:
    """One pack of `size` positions. `room` [n]: positions that each sequence takes; `indices`: which rows of the batch they are."""
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
        tokens[at], positions[at], padding[at] = np.concatenate([row.tokens for row in rows]), position, False
        # The prediction of token i is made at position i - 1: everything moves one to the left. Nothing predicts a first token, and the
        # last position of a sequence predicts nothing.
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


def _check(lengths: np.ndarray, token_budget: int) -> None:
    if not len(lengths):
        raise ValueError("there are no rows to pack")
    if not lengths.min():
        raise ValueError(f"row {int(lengths.argmin())} is empty")
    if lengths.max() > token_budget:
        raise UserError(
            f"a sequence of {lengths.max()} tokens does not fit into the token budget of {token_budget}; "
            "raise the token_budget of its section, or allow shorter prompts and responses only"
        )


def _check_rows(rows: Sequence[Row], indices: list[int], names: Sequence[str]) -> None:
    for row, index in zip(rows, indices, strict=True):
        if row.weights[0] != 0:
            raise ValueError(f"row {index} has a weight on its first token, which nothing predicts")
        if set(row.streams) != set(names):
            raise ValueError(f"row {index} has the streams {sorted(row.streams)}, the first one has {sorted(names)}")
