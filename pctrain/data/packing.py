"""Rows of different lengths into micro-batches of one fixed size, shared out over the data parallel ranks.

Every rank calls `pack_rows` with the same rows, finds the same packs, and builds the tensors of its own ones alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from pctrain.data.rows import Row
from pctrain.errors import UserError

NO_LABEL = -100
# Length at which attention costs about as much as the linear layers. It only weighs how packs are dealt out: full packs are equal in
# tokens, and the sum of squared lengths is what differs between them, whatever this figure is.
LENGTH_OF_EQUAL_COST = 4096


@dataclass(frozen=True)
class Pack:
    """One micro-batch of T = token_budget positions. A padding pack has no sequence: `cu_seqlens` is [0] and all weights are 0."""

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
    loss_tokens: float  # sum of all weights: the one denominator
    tokens: int  # real tokens
    positions: int  # of all packs, padding included
    sequences: int


def pack_rows(rows: Sequence[Row], token_budget: int, *, dp_rank: int = 0, dp_size: int = 1, align: int = 1) -> PackedBatch:
    """First-fit decreasing over the rows; the packs are dealt over the ranks so that their costs are even.

    The packs are the same whatever `dp_size` is, apart from the padding packs that a rank with fewer packs gets. Every sequence takes a
    multiple of `align` positions, a divisor of the budget: what is over is padding at its end, and belongs to it in `cu_seqlens`.

    Raises:
        UserError: a row longer than the token budget.
        ValueError: no rows, an empty row, a weight on a first token, or rows with different streams.
    """
    _check(rows, token_budget)
    lengths = np.array([len(row) for row in rows], dtype=np.int64)
    room = -(-lengths // align) * align
    packs = first_fit_decreasing(room, token_budget)
    mine = deal([_cost(lengths[pack]) for pack in packs], dp_size)[dp_rank]
    per_rank = -(-len(packs) // dp_size)
    names = list(rows[0].streams)
    built = [_build(rows, packs[i], room[packs[i]], token_budget, names) for i in mine]
    built += [_build(rows, [], room[:0], token_budget, names) for _ in range(per_rank - len(mine))]
    # In double precision: a float32 sum of millions of ones would stop at 2**24.
    loss_tokens = float(sum(row.weights.sum(dtype=np.float64) for row in rows))
    return PackedBatch(built, loss_tokens, int(lengths.sum()), dp_size * per_rank * token_budget, len(rows))


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


def deal(costs: Sequence[float], ranks: int) -> list[list[int]]:
    """Pack indices of each rank, ascending: the dearest pack first, to the cheapest rank that has a place left (ceil(n / ranks) each)."""
    places = -(-len(costs) // ranks)
    hands: list[list[int]] = [[] for _ in range(ranks)]
    totals = [0.0] * ranks
    for pack in sorted(range(len(costs)), key=lambda i: (-costs[i], i)):
        rank = min((r for r in range(ranks) if len(hands[r]) < places), key=lambda r: (totals[r], r))
        hands[rank].append(pack)
        totals[rank] += costs[pack]
    return [sorted(hand) for hand in hands]


def _cost(lengths: np.ndarray) -> float:
    return float(lengths.sum() + (lengths**2).sum() / LENGTH_OF_EQUAL_COST)


def _build(rows: Sequence[Row], pack: list[int], room: np.ndarray, token_budget: int, names: list[str]) -> Pack:
    """`room` [n]: positions that each sequence takes."""
    bounds = np.concatenate([[0], np.cumsum(room)])
    tokens = np.zeros(token_budget, np.int64)
    labels = np.full(token_budget, NO_LABEL, np.int64)
    weights = np.zeros(token_budget, np.float32)
    positions = np.zeros(token_budget, np.int64)
    padding = np.ones(token_budget, bool)
    streams = {name: np.zeros(token_budget, np.float32) for name in names}
    if pack:
        lengths = np.array([len(rows[i]) for i in pack], dtype=np.int64)
        position = np.arange(lengths.sum()) - np.repeat(np.cumsum(lengths) - lengths, lengths)
        at = np.repeat(bounds[:-1], lengths) + position
        tokens[at], positions[at], padding[at] = np.concatenate([rows[i].tokens for i in pack]), position, False
        # The prediction of token i is made at position i - 1: everything moves one to the left. Nothing predicts a first token, and the
        # last position of a sequence predicts nothing.
        predicted = position > 0
        before = at[predicted] - 1
        labels[before] = tokens[before + 1]
        shifted = [(weights, [rows[i].weights for i in pack])]
        shifted += [(streams[name], [rows[i].streams[name] for i in pack]) for name in names]
        for target, values in shifted:
            target[before] = np.concatenate(values)[predicted]
    return Pack(
        torch.from_numpy(tokens), torch.from_numpy(labels), torch.from_numpy(weights), torch.from_numpy(positions),
        torch.from_numpy(padding), torch.from_numpy(bounds.astype(np.int32)),
        {name: torch.from_numpy(values) for name, values in streams.items()}, list(pack))


def _check(rows: Sequence[Row], token_budget: int) -> None:
    if not rows:
        raise ValueError("there are no rows to pack")
    names = set(rows[0].streams)
    for index, row in enumerate(rows):
        if not 1 <= len(row) <= token_budget:
            if len(row):
                raise UserError(f"a sequence of {len(row)} tokens does not fit into the token budget of {token_budget}; "
                                "raise the token_budget of its section, or allow shorter prompts and responses only")
            raise ValueError(f"row {index} is empty")
        if row.weights[0] != 0:
            raise ValueError(f"row {index} has a weight on its first token, which nothing predicts")
        if set(row.streams) != names:
            raise ValueError(f"row {index} has the streams {sorted(row.streams)}, the first one has {sorted(names)}")
