"""Advantages and the clipped loss against formulas written out, sample by sample, in float64; and two examples by hand."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pctrain.config import RLConfig
from pctrain.rl import algorithms
from pctrain.rl.policy import clipped_loss, group_advantages


def test_advantages_by_hand():
    # One prompt, four rollouts, one right: mean 1/4, sample standard deviation sqrt((9 + 1 + 1 + 1) / 16 / 3) = 1/2.
    centred = group_advantages(np.array([[1, 0, 0, 0]]), std_normalise=False)
    assert centred.tolist() == [[0.75, -0.25, -0.25, -0.25]]
    np.testing.assert_allclose(group_advantages(np.array([[1, 0, 0, 0]]), std_normalise=True), [[1.5, -0.5, -0.5, -0.5]], rtol=1e-5)


@given(st.lists(st.lists(st.sampled_from([0.0, 1.0]), min_size=5, max_size=5), min_size=1, max_size=6), st.booleans())
def test_advantages_of_a_group_sum_to_zero_and_vanish_where_rewards_are_equal(rewards, normalise):
    advantages = group_advantages(np.array(rewards), normalise)
    np.testing.assert_allclose(advantages.sum(1), 0, atol=1e-9)
    for row, group in zip(rewards, advantages, strict=True):
        assert (len(set(row)) > 1) == bool(np.abs(group).max() > 0.1)


def test_clipped_loss_by_hand():
    # Two tokens with ratio e^0.5 = 1.6487 and clip (0.2, 0.28).
    # A = +1: min(1.6487, 1.28) = 1.28, clipped, no gradient.   A = -1: min(-1.6487, -1.28) = -1.6487, gradient +r.
    logprob = torch.tensor([-0.5, -0.5], dtype=torch.float64, requires_grad=True)
    streams = {"advantage": torch.tensor([1.0, -1.0], dtype=torch.float64), "old_logprob": torch.tensor([-1.0, -1.0], dtype=torch.float64)}
    loss, metrics = clipped_loss(logprob, torch.zeros(2), streams, 0.2, 0.28)
    loss.sum().backward()
    assert loss.tolist() == pytest.approx([-1.28, math.exp(0.5)])
    assert logprob.grad.tolist() == pytest.approx([0.0, math.exp(0.5)])
    assert metrics["clip_share"].tolist() == [1.0, 0.0]
    assert metrics["ratio"].tolist() == pytest.approx([math.exp(0.5)] * 2)


token = st.tuples(st.floats(-4, 0), st.floats(-4, 0), st.floats(-2, 2))


@given(st.lists(token, min_size=1, max_size=20), st.sampled_from(["grpo", "dapo_dc"]))
def test_the_algorithms_follow_the_formula(tokens, name):
    rl = RLConfig(algorithm=name, clip_low=0.2, clip_high=0.28)
    columns = [torch.tensor(c, dtype=torch.float64) for c in zip(*tokens, strict=True)]
    logprob = columns[0].clone().requires_grad_()
    loss, _ = algorithms.build(rl).loss(logprob, torch.zeros_like(logprob), {"old_logprob": columns[1], "advantage": columns[2]})
    loss.sum().backward()
    high = 0.2 if name == "grpo" else 0.28
    for i, (new, old, advantage) in enumerate(tokens):
        ratio = math.exp(new - old)
        clipped = min(max(ratio, 0.8), 1 + high)
        assert loss[i].item() == pytest.approx(-min(ratio * advantage, clipped * advantage), abs=1e-12)
        inside = 0.8 < ratio < 1 + high
        if ratio * advantage < clipped * advantage or inside:
            assert logprob.grad[i].item() == pytest.approx(-ratio * advantage, abs=1e-12)
        elif ratio * advantage > clipped * advantage:
            assert logprob.grad[i].item() == 0


def test_at_ratio_one_the_gradient_is_reinforce():
    logprob = torch.tensor([-0.1, -2.0, -3.0], dtype=torch.float64, requires_grad=True)
    advantage = torch.tensor([0.5, -1.0, 2.0], dtype=torch.float64)
    loss, metrics = clipped_loss(logprob, torch.zeros(3), {"advantage": advantage}, 0.2, 0.28)
    loss.sum().backward()
    assert logprob.grad.tolist() == (-advantage).tolist()
    assert metrics["ratio"].tolist() == [1, 1, 1]


def test_dapo_equals_an_independent_implementation():
    """verl's and TRL's form of the clipped objective: max over negated terms, token mean."""
    generator = torch.Generator().manual_seed(0)
    logprob, old, advantage = (torch.randn(50, generator=generator, dtype=torch.float64) for _ in range(3))
    ours, _ = clipped_loss(logprob, torch.zeros(50), {"advantage": advantage, "old_logprob": old}, 0.2, 0.28)
    ratio = torch.exp(logprob - old)
    theirs = torch.max(-advantage * ratio, -advantage * torch.clamp(ratio, 0.8, 1.28))
    assert ours.mean().item() == pytest.approx(theirs.mean().item(), rel=1e-12)
