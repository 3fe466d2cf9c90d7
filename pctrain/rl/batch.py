"""From groups of rollouts to the batch of a step: advantages, rows, per-token streams, mini-batches."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import TypeVar

import numpy as np

from pctrain.config.tree import RLConfig
from pctrain.core import Learner
from pctrain.data.packing import PackedBatch
from pctrain.data.rows import Row
from pctrain.distributed.health import watchdog
from pctrain.rl.algorithms.base import Algorithm
from pctrain.rl.algorithms.normaliser import normalise
from pctrain.rl.groups import Group, MemberRow, RolloutMember

T = TypeVar("T")
AnyRow = TypeVar("AnyRow", bound=Row)


@dataclass(frozen=True)
class ModelPass:
    """A pass of the model over rows outside of training, for the ledger's `phase`."""

    phase: str
    rows: Sequence[Row]
    seconds: float


@dataclass(frozen=True)
class Batch:
    """The rows that a step trains on, what making them cost, and how long it took."""

    rows: list[MemberRow] = field(default_factory=list)
    passes: list[ModelPass] = field(default_factory=list)
    seconds: float = 0.0

    def split(self, updates: int) -> list[list[MemberRow]]:
        """Return the mini-batches of the step's optimizer updates."""
        return split(self.rows, updates)


@watchdog.phase("update")
def make_batch(
    algorithm: Algorithm, groups: Sequence[Group], learner: Learner, rl: RLConfig, temperature: float
) -> Batch:
    """Return the batch of a step, and set the advantages of its groups. Collective.

    `groups` are those that dynamic sampling kept; without any the batch is empty.
    """
    if not groups:
        return Batch()
    began = time.perf_counter()
    rows = algorithm.rows(groups)
    rows, passes = add_streams_from_pass(rows, learner, algorithm.streams_from_pass, rl.token_budget, temperature)
    rows = algorithm.finish(rows)
    _set_advantages(groups, rows)
    if algorithm.options.expert_in_group:
        # The paper counts a forward pass over the expert's tokens, as it does over sampled ones.
        passes.append(ModelPass("expert", [row for row in rows if row.member.is_expert], 0.0))
    if rl.truncated == "masked":
        rows = [row for row in rows if not row.member.truncated]
    return Batch(rows, passes, time.perf_counter() - began)


def add_streams_from_pass(
    rows: Sequence[AnyRow],
    learner: Learner,
    needed: frozenset[str] | set[str],
    token_budget: int,
    temperature: float,
) -> tuple[list[AnyRow], list[ModelPass]]:
    """Return the rows with the streams `needed`, and the passes that made them. Collective.

    old_logprob and entropy share one pass of the policy; ref_logprob takes one of the reference. The streams are 0 on
    tokens that are not trained on.
    """
    streams: dict[str, list[np.ndarray]] = {}
    passes = []
    if {"old_logprob", "entropy"} & needed:
        began = time.perf_counter()
        if "entropy" in needed:
            streams["old_logprob"], streams["entropy"] = learner.logprobs_and_entropies(
                rows, token_budget, temperature=temperature, trained_only=True
            )
        else:
            streams["old_logprob"] = learner.logprobs(rows, token_budget, temperature=temperature, trained_only=True)
        passes.append(ModelPass("logprob", rows, time.perf_counter() - began))
    if "ref_logprob" in needed:
        began = time.perf_counter()
        with learner.reference():
            streams["ref_logprob"] = learner.logprobs(rows, token_budget, temperature=temperature, trained_only=True)
        passes.append(ModelPass("reference", rows, time.perf_counter() - began))
    names = sorted(needed)
    complete = [
        replace(row, streams={**row.streams, **{name: streams[name][i] for name in names}})
        for i, row in enumerate(rows)
    ]
    return complete, passes


def split(rows: list[T], parts: int) -> list[list[T]]:
    """Return `parts` consecutive mini-batches of nearly equal size, or fewer if there are fewer rows."""
    bounds = np.linspace(0, len(rows), parts + 1).round().astype(int)
    return [rows[start:end] for start, end in pairwise(bounds) if end > start]


def pack(rows: Sequence[Row], learner: Learner, algorithm: Algorithm, token_budget: int) -> PackedBatch:
    """Return the packed rows of one update, with the denominator of the option `normaliser`."""
    weighted, denominator = normalise(rows, algorithm.options.normaliser, algorithm.max_response)
    return learner.pack(weighted, token_budget, denominator=denominator)


def _set_advantages(groups: Sequence[Group], rows: Sequence[MemberRow]) -> None:
    """Give each group the advantage of every rollout; 0 for a rollout without a row."""
    for group in groups:
        group.advantages = [0.0] * len(group.completions)
    for row in rows:
        if isinstance(row.member, RolloutMember) and row.member.group.advantages is not None:
            row.member.group.advantages[row.member.index] = float(row.streams["advantage"][-1])
