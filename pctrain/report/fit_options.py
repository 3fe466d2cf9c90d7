"""Options of `pctrain fit`. No NumPy here: `--help` must be fast."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field

from pctrain.config.tree import Section

PAPER_SHARE = 0.71  # of the points by index: the mean split of arXiv 2512.11470, appendix F


class FitOptions(Section):
    out: Path = Field(Path("fits.json"), description="where the fits go, a JSON list")
    method: Literal["bayes", "paper"] = Field(
        "bayes",
        description="bayes: posterior with interval, verdict and forecasts; paper: the pipeline of arXiv 2512.11470 (no uncertainty)",
    )
    points: float | None = Field(
        None,
        gt=0,
        le=1,
        description="share of each curve's points to fit, from its start; the rest is predicted and compared (not given: all; paper 0.71)",
    )
    reach: list[float] = Field(
        [],
        description="score, percent: the RL compute that it takes, and the probability that any does; may be repeated",
    )
    budget: list[float] = Field(
        [], description="RL compute, EFLOPs from the joint: the score that it buys; may be repeated"
    )
    tau: float | None = Field(
        None, gt=0, description="paper: modified z-score beyond which a point is an outlier (not given: 3)"
    )
    alpha: float | None = Field(
        None, ge=0.5, le=1, description="paper: share of the points that least trimmed squares keeps (not given: 0.75)"
    )
    eps: float | None = Field(None, ge=0, description="paper: jump at the joint, points (not given: 0)")
