"""The optimizer updates of a step, one per mini-batch of its batch."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from pctrain.config.tree import RLConfig
from pctrain.core import Learner, Update
from pctrain.distributed.health import watchdog
from pctrain.rl.algorithms.base import Algorithm
from pctrain.rl.batch import Batch, pack
from pctrain.rl.groups import MemberRow
from pctrain.rl.mismatch import measured


@dataclass(frozen=True)
class MadeUpdate:
    """One optimizer update and the rows that it trained on."""

    update: Update
    rows: Sequence[MemberRow]

    @property
    def problem_ids(self) -> list[str]:
        """The problems behind the rows."""
        return [row.member.group.problem.id for row in self.rows]


@dataclass(frozen=True)
class Updates:
    """The optimizer updates of one step, and how long they took together."""

    made: list[MadeUpdate] = field(default_factory=list)
    seconds: float = 0.0


@watchdog.phase("update")
def train_on(batch: Batch, learner: Learner, algorithm: Algorithm, rl: RLConfig, temperature: float) -> Updates:
    """Make one optimizer update per mini-batch; an empty batch makes none. Collective."""
    began = time.perf_counter()
    token_loss = measured(algorithm.loss)
    made = []
    for minibatch in batch.split(rl.updates):
        packed = pack(minibatch, learner, algorithm, rl.token_budget)
        update = learner.train_step(packed, token_loss, temperature=temperature)
        made.append(MadeUpdate(replace(update, metrics=algorithm.report(update.metrics)), minibatch))
    return Updates(made, time.perf_counter() - began)


def mean_metrics(updates: Sequence[Update]) -> dict[str, float]:
    """Return the metrics of a step: means over its updates that were not skipped (maxima stay maxima).

    Metrics that no update reported are omitted, for example rollout means when only expert rows were trained on, or all
    but the learning rate when every update was skipped. Without an update the result is empty.
    """
    if not updates:
        return {}
    values: dict[str, list[float]] = {"loss": [], "grad_norm": [], "lr": [update.lr for update in updates]}
    for update in updates:
        if update.skipped:
            continue
        values["loss"].append(update.loss)
        values["grad_norm"].append(update.grad_norm)
        for name, value in update.metrics.items():
            values.setdefault(name, []).append(value)
    means = {name: _reduce(name, of_updates) for name, of_updates in values.items() if of_updates}
    return {**means, "skipped_updates": sum(update.skipped for update in updates)}


def _reduce(name: str, values: list[float]) -> float:
    return float(np.max(values) if name.startswith("max/") else np.mean(values))
