"""Sections `ceiling` and `study`: the regimes of the validation loss, and what `pctrain run` runs."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from pctrain.config.algorithm import AlgorithmChoice
from pctrain.config.data import Sources
from pctrain.config.section import Section


class CeilingConfig(Section):
    """The bounds between the regimes of SFT, as shares of the minimum validation loss (arXiv 2512.11470)."""

    delta: float = Field(0.02, gt=0, description="stable regime: loss <= (1 + delta) x minimum")
    delta2: float = Field(0.10, gt=0, description="severe overfitting: loss >= (1 + delta2) x minimum")


class StudyConfig(Section):
    """The stages of `pctrain run`: SFT on each set, RL from its checkpoints with each algorithm, for each seed.

    docs/study.md is the guide.
    """

    policy: Literal["recommended", "paper", "compare"] = Field(
        "paper",
        description="recommended: SFT until its stable regime ends, RL from the one checkpoint that the monitor "
        "chose; paper: RL from each of study.starts; compare: SFT alone, RL alone, RL from the monitor's checkpoint, "
        "and synchronized methods from the base model",
    )
    sets: dict[str, Sources] = Field(
        {}, description="trajectory sets by name, instead of data.train; each gets an SFT run"
    )
    starts: list[Literal["early", "stable", "overfit"]] = Field(
        ["early", "stable", "overfit"], description="policy paper: regimes of SFT whose checkpoints RL starts from"
    )
    checkpoints: list[int] = Field(
        [], description="policy paper: SFT steps that RL starts from, instead of study.starts; 0: without SFT"
    )
    algorithms: list[AlgorithmChoice] = Field(
        [],
        description="RL algorithms, each a name or {name: NAME, OPTION: VALUE, ...}; options set under rl.algorithm "
        "apply to each that has them; default: rl.algorithm; for policy compare all seven",
    )
    seeds: list[int] = Field(
        [], description="seeds of data order and sampling; every stage runs once per seed; default: run.seed"
    )
