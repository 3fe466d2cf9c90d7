"""The result of `pctrain fit` for one curve."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from pctrain.ceiling.curve import Curve
from pctrain.ceiling.fit import Fit
from pctrain.ceiling.forecast import AtBudget, HeldOut, Reach
from pctrain.ceiling.paper_fit import PaperFit


@dataclass(frozen=True)
class Result:
    """The fit of one curve and the forecasts that the user asked for."""

    curve: Curve
    fit: Fit | PaperFit
    held_out: HeldOut | None
    reach: list[Reach]
    budget: list[AtBudget]

    def row(self) -> dict[str, Any]:
        """Return the row of fits.json: plain JSON values, with the keys of docs/reference/ceilings.md."""
        row = self.fit.as_row(self.curve.dataset, self.curve.start_step)
        if self.held_out is not None:
            row["held_out"] = dataclasses.asdict(self.held_out)
        if self.reach:
            row["reach"] = [dataclasses.asdict(entry) for entry in self.reach]
        if self.budget:
            row["budget"] = [dataclasses.asdict(entry) for entry in self.budget]
        return row
