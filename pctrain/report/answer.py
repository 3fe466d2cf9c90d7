"""The type of an answer, and what the questions share: scores over seeds, groups of runs, JSON of the evidence."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from pctrain.ceiling.stats import Measured, mean_over_seeds
from pctrain.report.study_data import ScoredRun

INDISTINGUISHABLE = "The interval includes zero: the two are statistically indistinguishable."

Key = TypeVar("Key")
Item = TypeVar("Item")


@dataclass(frozen=True)
class Answer:
    """The text of an answer and the numbers behind it, `evidence`, as plain JSON values.

    `supported` is true if the interval of the claim that the text makes excludes zero.
    """

    question: str
    text: str
    evidence: dict[str, Any] = field(default_factory=dict)
    supported: bool = False


def final_score(runs: Sequence[ScoredRun]) -> Measured:
    """Return the mean last score of runs that differ in the seed only."""
    return mean_over_seeds([run.last.measured for run in runs])


def score_json(score: Measured) -> dict[str, Any]:
    """Return a mean over seeds as evidence."""
    seeds = 1 if math.isinf(score.freedom) else round(score.freedom) + 1
    return {"mean": score.value, "se": score.se, "freedom": score.freedom, "seeds": seeds}


def difference_json(value: Measured) -> dict[str, float]:
    """Return a difference in points as evidence."""
    return {"points": value.value, "low": value.low, "high": value.high}


def grouped(items: Iterable[Item], key: Callable[[Item], Key]) -> dict[Key, list[Item]]:
    """Return the items by key, in the order in which the keys first occur."""
    groups: dict[Key, list[Item]] = {}
    for item in items:
        groups.setdefault(key(item), []).append(item)
    return groups


def start_of(run: ScoredRun) -> str:
    """Return the role of the checkpoint a run started from, or its step if it has no role."""
    return run.role if run.role != "none" else f"step {run.start_step}"
