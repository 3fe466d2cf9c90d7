"""Updates that were skipped because loss or gradient was not finite, or too large: counted, and too many in a row end the run."""

from __future__ import annotations

import math
from collections.abc import Sequence

from pctrain.common.errors import UserError
from pctrain.core.learner import Update


class SkippedUpdates:
    """Skipped updates since the last one that was made. `limit`: `optimizer.max_skipped`. State: the count."""

    def __init__(self, limit: int, in_a_row: int = 0):
        self.limit = limit
        self.in_a_row = in_a_row

    def add(self, update: Update, step: int, ids: Sequence[str]) -> None:
        """`ids`: of the samples of this update, for the message.

        Raises:
            UserError: the limit is reached. Every rank raises, for an update is skipped on all of them.
        """
        self.in_a_row = self.in_a_row + 1 if update.skipped else 0
        if self.in_a_row < self.limit:
            return
        what = f"the loss ({update.loss}) is not finite"
        if math.isfinite(update.loss):
            too_large = math.isfinite(update.grad_norm)
            what = f"the gradient norm is {f'{update.grad_norm:.3g}, above optimizer.skip_above' if too_large else 'not finite'}"
        raise UserError(
            f"step {step}: {what}, and {self.in_a_row} updates in a row were skipped for that (optimizer.max_skipped = "
            f"{self.limit}). Lower the learning rate, or look at the samples of the last batch: {', '.join(dict.fromkeys(ids))}"
        )
