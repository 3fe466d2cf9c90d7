"""The tokens of a call that have a target."""

from __future__ import annotations

import torch
from torch import Tensor


class LabelledRows:
    """The n of T tokens that have a target: target int64 [n], rows int64 [n] or None for all T."""

    def __init__(self, target: Tensor, ignore_index: int, rows: Tensor | None = None) -> None:
        """Choose the rows; if the caller gives them, the host does not wait for a GPU to count them."""
        has_target = target != ignore_index
        given = rows is not None
        if rows is None:
            rows = has_target.nonzero().squeeze(1)
        self.rows = None if rows.shape == target.shape else rows
        self._tokens = target.shape[0]
        self.target = self.select(target)
        if given:
            is_right = (has_target.sum() == rows.shape[0]) & self.select(has_target).all() & (rows.diff() > 0).all()
            torch._assert_async(is_right, "rows are not the ascending positions whose target is not ignore_index")

    def select(self, per_token: Tensor) -> Tensor:
        """Return [n, ...], the rows with a target, from [T, ...]."""
        return per_token if self.rows is None else per_token.index_select(0, self.rows)

    def scatter(self, per_row: Tensor) -> Tensor:
        """Return [T] from [n], with 0 on tokens without a target."""
        return per_row if self.rows is None else per_row.new_zeros(self._tokens).index_copy_(0, self.rows, per_row)

    def check_targets(self, vocab_start: int, columns: int, valid_vocab: int | None, *, sharded: bool) -> None:
        """Fail on a target outside the vocabulary.

        With shards of unknown total size such a row gets the log-prob -inf instead.
        """
        first = 0 if sharded else vocab_start
        end = valid_vocab if sharded else first + columns
        if end is not None and self.target.numel():
            low, high = self.target.aminmax()
            torch._assert_async(
                (low >= first) & (high < end), f"a target is neither ignore_index nor in [{first}, {end})"
            )
