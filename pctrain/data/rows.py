"""The token row that is packed and trained on."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np


@dataclass(frozen=True)
class Row:
    """One sequence of L tokens.

    `weights[i]` and `streams[name][i]` belong to the PREDICTION OF `tokens[i]`. Nothing predicts the first token, so
    `weights[0]` is 0.
    """

    tokens: np.ndarray  # int64 [L]
    weights: np.ndarray  # float32 [L]
    streams: dict[str, np.ndarray] = field(default_factory=dict)  # {name: float32 [L]}

    def __len__(self) -> int:
        return len(self.tokens)


@dataclass(frozen=True)
class RowSet:
    """Rows with known lengths and weights. The tokens of a row are read when the row is requested as `rows[i]`."""

    lengths: np.ndarray  # int64 [n]
    loss_tokens: float  # sum of all weights
    read: Callable[[int], Row]
    streams: tuple[str, ...] = ()  # the stream names of every row

    @classmethod
    def of(cls, rows: Sequence[Row]) -> RowSet:
        """Return the set of rows that are in memory already."""
        lengths = np.array([len(row) for row in rows], dtype=np.int64)
        # In double precision: a float32 sum of millions of ones would stop at 2**24.
        loss_tokens = float(sum(row.weights.sum(dtype=np.float64) for row in rows))
        return cls(lengths, loss_tokens, rows.__getitem__, tuple(rows[0].streams) if rows else ())

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> Row:
        return self.read(index)


def make_row(
    prompt_ids: Sequence[int], completion_ids: Sequence[int], streams: Mapping[str, float] | None = None
) -> Row:
    """Return a row with weight 1 on every token of the completion (including its EOS, if any) and 0 on the prompt.

    Args:
        prompt_ids: at least one token, because the first token of the completion needs one to be predicted from.
        completion_ids: the tokens to train on.
        streams: per-sequence values, such as an advantage, that are spread over the whole row.
    """
    if not len(prompt_ids):
        raise ValueError("a row needs at least one prompt token")
    tokens = np.concatenate([np.asarray(prompt_ids, np.int64), np.asarray(completion_ids, np.int64)])
    weights = np.ones(len(tokens), np.float32)
    weights[: len(prompt_ids)] = 0
    per_token = {name: np.full(len(tokens), value, np.float32) for name, value in (streams or {}).items()}
    return Row(tokens, weights, per_token)
