"""Options of `pctrain fit`. This module does not import NumPy, because `--help` must be fast."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field

from pctrain.config.tree import Section

PAPER_SHARE = 0.71  # share of the points, by index: the mean split of arXiv 2512.11470, appendix F


class FitOptions(Section):
    """The options of `pctrain fit`."""

    out: Path = Field(Path("fits.json"), description="file for the fits, a JSON list")
    method: Literal["bayes", "paper"] = Field(
        "bayes",
        description="bayes: posterior with interval, verdict and forecasts; "
        "paper: the pipeline of arXiv 2512.11470, appendix F (no uncertainty)",
    )
    points: float | None = Field(
        None,
        gt=0,
        le=1,
        description="share of each curve's points to fit, from its start; the other points are compared with the "
        "forecast (default: all; paper 0.71)",
    )
    reach: list[float] = Field(
        [],
        description="score in percent: print the RL compute that it takes and the probability that any compute is "
        "enough; may be repeated",
    )
    budget: list[float] = Field(
        [],
        description="RL compute in EFLOPs from the switch point: print the score that it buys; may be repeated",
    )
    tau: float | None = Field(
        None, gt=0, description="paper: modified z-score beyond which a point is an outlier (default: 3)"
    )
    alpha: float | None = Field(
        None, ge=0.5, le=1, description="paper: share of the points that least trimmed squares keeps (default: 0.75)"
    )
    eps: float | None = Field(None, ge=0, description="paper: jump at the switch point, points (default: 0)")
