"""Skipped updates: those whose loss or gradient was not finite, or too large. Too many in a row end the run."""

from __future__ import annotations

import math
from collections.abc import Sequence

from pctrain.common.errors import UserError
from pctrain.core.learner import Update


class SkippedUpdates:
    """Counts the skipped updates since the last one that was made. `limit` is `optimizer.max_skipped`."""

    def __init__(self, limit: int, in_a_row: int = 0):
        self.limit = limit
        self.in_a_row = in_a_row

    def add(self, update: Update, step: int, ids: Sequence[str]) -> None:
        """Count an update; `ids` names its samples, for the message.

        UserError if the limit is reached. Every rank raises it, because an update is skipped on all of them.
        """
        self.in_a_row = self.in_a_row + 1 if update.skipped else 0
        if self.in_a_row < self.limit:
            return
        raise UserError(
            f"step {step}: {_cause(update)}, and {self.in_a_row} updates in a row were skipped for that "
            f"(optimizer.max_skipped = {self.limit}). Lower the learning rate, or look at the samples of the last "
            f"batch: {', '.join(dict.fromkeys(ids))}"
        )


def _cause(update: Update) -> str:
    if not math.isfinite(update.loss):
        return f"the loss ({update.loss}) is not finite"
    if not math.isfinite(update.grad_norm):
        return "the gradient norm is not finite"
    return f"the gradient norm is {update.grad_norm:.3g}, above optimizer.skip_above"
