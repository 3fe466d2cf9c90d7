"""From groups of rollouts to rows with their per-token streams."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from pctrain.core import Core
from pctrain.data.rows import Row, make_row
from pctrain.rl.algorithms import Algorithm
from pctrain.rl.sampling import Group


def rows_of(groups: list[Group], algorithm: Algorithm) -> list[Row]:
    """One row a rollout, in order; stream `advantage` on every token, weight 1 on the response's."""
    advantages = algorithm.advantages(np.array([group.rewards for group in groups]))
    return [
        make_row(group.problem.prompt_ids, completion.token_ids, {"advantage": advantages[i, k]})
        for i, group in enumerate(groups)
        for k, completion in enumerate(group.completions)
    ]


def with_old_logprobs(rows: list[Row], core: Core, token_budget: int, temperature: float) -> list[Row]:
    """Adds the stream `old_logprob`, from one no-grad pass: needed when the policy moves within a step. Collective."""
    old = core.logprobs(rows, token_budget, temperature=temperature, trained_only=True)
    return [replace(row, streams={**row.streams, "old_logprob": logprob}) for row, logprob in zip(rows, old, strict=True)]


def split(rows: list, parts: int) -> list[list]:
    """`parts` consecutive mini-batches of (nearly) equal size; fewer where there are fewer rows."""
    bounds = np.linspace(0, len(rows), parts + 1).round().astype(int)
    return [rows[a:b] for a, b in zip(bounds[:-1], bounds[1:], strict=True) if b > a]
