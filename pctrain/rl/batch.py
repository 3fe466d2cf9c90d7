"""From groups of rollouts to the packed batches of a step's updates."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace

import numpy as np

from pctrain.core import Learner
from pctrain.data.packing import PackedBatch
from pctrain.data.rows import Row
from pctrain.rl.algorithms.base import Algorithm
from pctrain.rl.algorithms.normaliser import normalise

Count = Callable[[str, list[Row], float], None]  # (phase of the ledger, rows that went through it, seconds)


def no_grad_streams(
    rows: list[Row],
    learner: Learner,
    needed: frozenset[str] | set[str],
    token_budget: int,
    temperature: float,
    count: Count,
) -> list[Row]:
    """The rows with the streams `needed` of old_logprob, entropy (together one pass) and ref_logprob (one with the reference). Collective.

    They are 0 where nothing is trained on. `count` is called for each pass, with the phases `logprob` and `reference`.
    """
    found: dict[str, list[np.ndarray]] = {}
    options = {"temperature": temperature, "trained_only": True}
    if {"old_logprob", "entropy"} & needed:
        began = time.perf_counter()
        want_entropy = "entropy" in needed
        result = learner.logprobs(rows, token_budget, want_entropy=want_entropy, **options)
        found = dict(zip(("old_logprob", "entropy"), result if want_entropy else (result,)))
        count("logprob", rows, time.perf_counter() - began)
    if "ref_logprob" in needed:
        began = time.perf_counter()
        with learner.reference():
            found["ref_logprob"] = learner.logprobs(rows, token_budget, **options)
        count("reference", rows, time.perf_counter() - began)
    return [
        replace(row, streams={**row.streams, **{name: found[name][i] for name in sorted(needed)}})
        for i, row in enumerate(rows)
    ]


def split(rows: list, parts: int) -> list[list]:
    """`parts` consecutive mini-batches of (nearly) equal size; fewer where there are fewer rows."""
    bounds = np.linspace(0, len(rows), parts + 1).round().astype(int)
    return [rows[a:b] for a, b in zip(bounds[:-1], bounds[1:], strict=True) if b > a]


def pack(rows: list[Row], learner: Learner, algorithm: Algorithm, token_budget: int) -> PackedBatch:
    """The rows of one update, packed, with the denominator of `rl.normaliser`."""
    rows, denominator = normalise(rows, algorithm.rl.normaliser, algorithm.max_response)
    return learner.pack(rows, token_budget, denominator=denominator)
