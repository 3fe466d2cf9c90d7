"""One step's rollouts become optimizer updates: rows, the passes without gradients that they need, mini-batches."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from pctrain.compute.ledger import Ledger
from pctrain.config.tree import Config
from pctrain.core import Learner, Update
from pctrain.data.rows import Row
from pctrain.distributed.health import watchdog
from pctrain.rl import batch
from pctrain.rl.algorithms.base import Algorithm
from pctrain.rl.mismatch import measured
from pctrain.rl.sampling import Group, Sampled


@dataclass(frozen=True)
class Updates:
    made: list[Update]
    ids: list[list[str]]  # of each update: the problems behind its rows
    advantages: dict[int, list[float]]  # id() of a group -> of each of its rollouts


@watchdog.phase("update")
def update(
    config: Config, learner: Learner, algorithm: Algorithm, sampled: Sampled, ledger: Ledger, step: int
) -> Updates:
    """The optimizer updates of one step, and the ledger's entries for all of its compute. Nothing kept: no update. Collective."""
    rl, temperature, groups = config.rl, config.rollout.temperature, sampled.kept
    _count(ledger, step, "rollout", groups, sampled.rollout_seconds)
    # Sampled together with the kept ones: the seconds stand there.
    _count(ledger, step, "rollout_rejected", [group for group, _ in sampled.dropped], 0.0)
    if not groups:
        return Updates([], [], {})

    def count(phase: str, rows: Sequence[Row], seconds: float) -> None:
        ledger.add(step, phase, [len(row) for row in rows], seconds)

    rows = algorithm.rows(groups)
    rows = batch.no_grad_streams(rows, learner, algorithm.streams_from_pass, rl.token_budget, temperature, count)
    rows = algorithm.finish(rows, groups)
    members = algorithm.members(groups)
    advantages: dict[int, list[float]] = {id(group): [0.0] * len(group.completions) for group in groups}
    for member, row in zip(members, rows, strict=True):
        if member.index is not None:
            advantages[id(groups[member.group])][member.index] = float(row.streams["advantage"][-1])
    if algorithm.expert_in_group:  # the paper counts a forward pass of the expert's tokens, as of what was sampled
        count("expert", [row for member, row in zip(members, rows, strict=True) if member.index is None], 0.0)
    ids, by_expert = (
        [groups[member.group].problem.id for member in members],
        [member.index is None for member in members],
    )
    if rl.truncated == "masked":
        whole = [
            member.index is None or groups[member.group].completions[member.index].finish == "stop"
            for member in members
        ]
        rows, ids, by_expert = (
            [item for item, keep in zip(items, whole, strict=True) if keep] for items in (rows, ids, by_expert)
        )

    began = time.perf_counter()
    token_loss = measured(algorithm.loss)
    made = [
        learner.step(batch.pack(part, learner, algorithm, rl.token_budget), token_loss, temperature=temperature)
        for part in batch.split(rows, rl.updates)
    ]
    seconds = time.perf_counter() - began
    # Rollouts and expert trajectories apart: the paper's formulas have a mean length of each.
    for kind in (False, True):
        if of_kind := [row for row, one in zip(rows, by_expert, strict=True) if one == kind]:
            count("rl_update", of_kind, seconds * sum(map(len, of_kind)) / sum(map(len, rows)))
    made = [replace(one, metrics=algorithm.report(one.metrics)) for one in made]
    return Updates(made, batch.split(ids, rl.updates), advantages)


def means(updates: Sequence[Update]) -> dict[str, float]:
    """Over the updates of a step that were made, and how many were skipped; empty where there was none. Maxima stay maxima.

    What no update has is left out: a mean over what was sampled, where only experts were learnt from; all but the learning rate, where
    every update was skipped.
    """
    if not updates:
        return {}
    made = [u for u in updates if not u.skipped]
    names = {"loss": [u.loss for u in made], "grad_norm": [u.grad_norm for u in made], "lr": [u.lr for u in updates]}
    names |= {
        key: [u.metrics[key] for u in made if key in u.metrics]
        for key in dict.fromkeys(key for u in made for key in u.metrics)
    }
    found = {
        name: float((np.max if name.startswith("max/") else np.mean)(values))
        for name, values in names.items()
        if values
    }
    return {**found, "skipped_updates": sum(u.skipped for u in updates)}


def _count(ledger: Ledger, step: int, phase: str, groups: list[Group], seconds: float) -> None:
    if groups:
        ledger.add(step, phase, [length for group in groups for length in group.lengths], seconds)
