"""Random groups of rollouts, and an algorithm's loss and gradient on them for given log-probs.

The tests compare them with naive versions of each algorithm.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from pctrain.config.tree import RLConfig
from pctrain.data.problems import Problem
from pctrain.data.rows import Row
from pctrain.reward import Verdict
from pctrain.rl.algorithms import registry as algorithms
from pctrain.rl.algorithms.base import Algorithm
from pctrain.rl.algorithms.normaliser import normalise
from pctrain.rl.groups import Group, MemberRow
from pctrain.rollout import Completion

MAX_RESPONSE = 12
PROMPT = [7, 8, 9]


def algorithm(name: str, **options: Any) -> Algorithm:
    """Return an algorithm with the given options and keys of `rl` (updates, group)."""
    rl = {key: value for key, value in options.items() if key in RLConfig.model_fields}
    own = {key: value for key, value in options.items() if key not in rl}
    return algorithms.build(RLConfig(algorithm={"name": name, **own}, **rl), MAX_RESPONSE)


def group(
    index: int,
    rewards: list[float],
    responses: list[list[int]],
    prefixes: list[list[int]] | None = None,
    expert: Sequence[int] = (),
    logprobs: Sequence[list[float] | None] | None = None,
) -> Group:
    verdicts = [Verdict(reward, "right" if reward else "wrong") for reward in rewards]
    logprobs = logprobs or [None] * len(rewards)
    completions = [Completion(tokens, "stop", known) for tokens, known in zip(responses, logprobs, strict=True)]
    problem = Problem(f"p{index}", index, "x", PROMPT, "1", list(expert))
    return Group(problem, completions, verdicts, prefixes or [[] for _ in rewards])


def random_groups(seed: int, *, prompts: int = 4, size: int = 4, prefix: bool = False) -> list[Group]:
    """Return groups with rewards 0 and 1 and responses of 1 to 6 tokens; the first is all wrong, the second all right.

    With `prefix` the last rollout of each group continues up to 6 tokens of its expert's 8.
    """
    rng = np.random.default_rng(seed)
    groups = []
    for i in range(prompts):
        rewards = [float(i)] * size if i < 2 else [1.0, *rng.integers(0, 2, size - 2).astype(float).tolist(), 0.0]
        responses = [rng.integers(10, 250, rng.integers(1, 7)).tolist() for _ in range(size)]
        expert = rng.integers(10, 250, 8).tolist()
        prefixes = [[] for _ in range(size - 1)] + [expert[: rng.integers(0, 7)] if prefix else []]
        logprobs = [(-rng.random(len(tokens))).astype(np.float32).tolist() for tokens in responses]
        groups.append(group(i, rewards, responses, prefixes, expert, logprobs))
    return groups


@dataclass
class Tokens:
    """One response's per-token values, float64 [n]; `logprob` and `entropy` are leaves."""

    logprob: torch.Tensor
    entropy: torch.Tensor
    old: torch.Tensor
    ref: torch.Tensor


def random_tokens(lengths: list[int], seed: int, old: bool = True) -> list[Tokens]:
    """Return values for each response, exact in float32. Without `old` the policy has not moved."""
    generator = torch.Generator().manual_seed(seed)
    tokens = []
    for n in lengths:
        logprob, entropy, moved, ref = (torch.rand(n, generator=generator).double() for _ in range(4))
        before = (-logprob + (moved - 0.5)).float().double() if old else -logprob
        tokens.append(Tokens((-logprob).requires_grad_(), (2 * entropy).requires_grad_(), before, -ref))
    return tokens


NaiveLoss = Callable[[list[Group], list[Tokens]], torch.Tensor]


def response_lengths(rows: Sequence[Row]) -> list[int]:
    return [len(row) - len(PROMPT) for row in rows]


def with_pass(rows: Sequence[MemberRow], tokens: list[Tokens], needed: Collection[str]) -> list[MemberRow]:
    """Return the rows with the streams of the pass without gradients; NaN on the prompt, which nothing may read."""
    named = {"old_logprob": "old", "ref_logprob": "ref", "entropy": "entropy"}
    full = []
    for row, of_row in zip(rows, tokens, strict=True):
        assert len(of_row.logprob) == len(row) - len(PROMPT)
        streams = {
            name: np.concatenate([np.full(len(PROMPT), np.nan), getattr(of_row, named[name]).detach().numpy()]).astype(
                np.float32
            )
            for name in needed
        }
        full.append(replace(row, streams={**row.streams, **streams}))
    return full


def total(algo: Algorithm, rows: Sequence[Row], tokens: list[Tokens]) -> tuple[torch.Tensor, dict[str, float]]:
    """Return (loss, metrics) of the rows as one update: all tokens in one tensor, weighted as in `core.step`."""
    rows, denominator = normalise(rows, algo.options.normaliser, algo.max_response)
    own = [row.weights > 0 for row in rows]
    weights = torch.from_numpy(np.concatenate([row.weights[k] for row, k in zip(rows, own, strict=True)])).double()
    streams = {
        name: torch.from_numpy(
            np.concatenate([row.streams[name][k] for row, k in zip(rows, own, strict=True)])
        ).double()
        for name in rows[0].streams
    }
    loss, metrics = algo.loss(torch.cat([t.logprob for t in tokens]), torch.cat([t.entropy for t in tokens]), streams)
    assert not any(value.requires_grad for value in metrics.values())
    value = (weights * loss).sum() / (weights.sum() if denominator is None else denominator)
    return value, {name: float((weights * m).sum() / weights.sum()) for name, m in metrics.items()}


def gradients(loss: torch.Tensor, tokens: list[Tokens]) -> list[np.ndarray]:
    """Return d loss / d logprob and d loss / d entropy of every response, in turn."""
    leaves = [leaf for t in tokens for leaf in (t.logprob, t.entropy)]
    grads = torch.autograd.grad(loss, leaves, allow_unused=True)
    return [np.zeros(len(leaf)) if g is None else g.numpy() for g, leaf in zip(grads, leaves, strict=True)]


def compare(algo: Algorithm, groups: list[Group], naive: NaiveLoss, seed: int, moved: bool = True) -> dict[str, float]:
    """Assert that loss and gradients of `algo` equal those of `naive(groups, tokens by row)`; return the metrics."""
    rows = algo.rows(groups)
    tokens = random_tokens(response_lengths(rows), seed, old=moved)
    needed = set(algo.streams_from_pass) | ({"old_logprob"} if moved else set())
    loss, metrics = total(algo, algo.finish(with_pass(rows, tokens, needed)), tokens)
    want = naive(groups, tokens)
    assert abs(float(want.detach())) > 1e-4  # the loss is not trivially zero
    np.testing.assert_allclose(loss.item(), want.item(), rtol=2e-6, atol=1e-7)
    for got, expected in zip(gradients(loss, tokens), gradients(want, tokens), strict=True):
        np.testing.assert_allclose(got, expected, rtol=2e-5, atol=1e-7)  # streams are float32
    return metrics
