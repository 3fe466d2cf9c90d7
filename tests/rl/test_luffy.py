"""LUFFY: by hand, and against a version written sample by sample from the paper's objective."""

import math

import numpy as np
import pytest
import torch

from tests.helpers import naive_losses, rl_cases


def test_by_hand():
    # Two prompts, one rollout each and the expert; one token a response but for the second expert's two.
    # Prompt 0: rewards 0 and the expert's 1: A = -1/2, +1/2.   Prompt 1: rewards 1 and 1: A = 0, 0.
    # p = 0.5 for the wrong rollout (ratio 1), p = 0.1 for the expert's token: r_hat = 0.1 / 0.2 = 0.5,
    # d r_hat / d log p = p x 0.1 / (p + 0.1)^2 = 0.1 x 0.1 / 0.04 = 0.25.
    # Loss = (+1/2 x 1 - 1/2 x 0.5 + 0) / 5 tokens = 0.25 / 5 = 0.05.  Gradient: +1/2 / 5 = 0.1;  -1/2 x 0.25 / 5 =
    # -0.025;  0.
    groups = [rl_cases.group(0, [0], [[10]], expert=[20]), rl_cases.group(1, [1], [[11]], expert=[21, 22])]
    algorithm = rl_cases.algorithm("luffy", group=2, entropy_coef=0.0)
    rows = algorithm.rows(groups)
    assert [row.tokens.tolist()[3:] for row in rows] == [[10], [20], [11], [21, 22]]
    assert [row.streams["advantage"][-1] for row in rows] == [-0.5, 0.5, 0, 0]
    assert [row.streams["expert"].tolist() for row in rows] == [
        [0, 0, 0, 0],
        [0, 0, 0, 1],
        [0, 0, 0, 0],
        [0, 0, 0, 1, 1],
    ]
    tokens = rl_cases.random_tokens([1, 1, 1, 2], seed=0, old=False)
    for row, p in ((0, 0.5), (1, 0.1)):
        tokens[row].logprob = torch.tensor([math.log(p)], dtype=torch.float64, requires_grad=True)
    loss, metrics = rl_cases.total(algorithm, rows, tokens)
    assert loss.item() == pytest.approx(0.05)
    assert np.concatenate(rl_cases.gradients(loss, tokens)[::2]) == pytest.approx([0.1, -0.025, 0, 0, 0])
    assert metrics["expert"] == pytest.approx(3 / 5)
    assert algorithm.report(metrics)["ratio"] == pytest.approx(1)  # a mean over the rollouts' tokens alone


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("moved", [True, False])
def test_is_the_naive_version(seed, moved):
    metrics = rl_cases.compare(
        rl_cases.algorithm("luffy", updates=2), rl_cases.random_groups(seed), naive_losses.luffy, seed, moved
    )
    assert metrics["clip_share"] == 0


def test_the_expert_takes_one_place_in_the_group():
    algorithm = rl_cases.algorithm("luffy")
    assert algorithm.options.needs_expert and not algorithm.options.dynamic_sampling
    assert algorithm.prefixes(rl_cases.random_groups(0)[0].problem, 1, 10, 0) == [[]] * 7
