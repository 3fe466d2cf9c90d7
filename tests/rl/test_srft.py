"""SRFT: by hand, and against a version written sample by sample from the paper's objective."""

import math

import numpy as np
import pytest
import torch

from tests.helpers import naive_losses, rl_cases


def test_by_hand():
    # Two prompts with an expert's trajectory of one token each; the wrong rollout of prompt 0 has one token.
    # Expert 0: H = ln 2, w1 = 0.5 exp(-ln 2) = 0.25; A = 1 - 1/2 = 1/2; p = 0.1: r_hat = 0.5, its derivative 0.25 (see
    # LUFFY).   loss = 0.25 (-ln 0.1) - 0.25 x 0.5 x 0.5 = 0.575646 - 0.0625 = 0.513146;  gradient = -0.25 - 0.25 x 0.5
    # x 0.25 = -0.28125 Wrong rollout: +log p = ln 0.5 = -0.693147; gradient +1.
    # Expert 1: with a right rollout A = 0; H = 0, w1 = 0.5, p = 0.5: loss = 0.5 x 0.693147 = 0.346574; gradient -0.5.
    # The right rollout of prompt 1 has no token.
    # Mean over the 3 tokens: (0.513146 - 0.693147 + 0.346574) / 3 = 0.055524; gradients / 3.
    groups = [rl_cases.group(0, [0], [[10]], expert=[20]), rl_cases.group(1, [1], [[]], expert=[21])]
    algorithm = rl_cases.algorithm("srft", group=2, entropy_coef=0.0)
    rows, tokens = algorithm.rows(groups), rl_cases.random_tokens([1, 1, 0, 1], seed=0, old=False)
    for row, p, entropy in ((0, 0.5, 0.3), (1, 0.1, math.log(2)), (3, 0.5, 0.0)):
        tokens[row].logprob = torch.tensor([math.log(p)], dtype=torch.float64, requires_grad=True)
        tokens[row].entropy = torch.tensor([entropy], dtype=torch.float64, requires_grad=True)
    assert algorithm.streams_from_pass == {"entropy"}
    rows = algorithm.finish(rl_cases.with_pass(rows, tokens, {"entropy"}))
    loss, _ = rl_cases.total(algorithm, rows, tokens)
    assert [row.streams["advantage"][-1] for row in rows] == [-0.5, 0.5, 0, 0]
    assert loss.item() == pytest.approx(0.055524, abs=1e-6)
    assert np.concatenate(rl_cases.gradients(loss, tokens)[::2]) == pytest.approx(
        [1 / 3, -0.28125 / 3, -0.5 / 3], abs=1e-6
    )


@pytest.mark.parametrize("seed", range(6))
def test_is_the_naive_version(seed):
    rl_cases.compare(rl_cases.algorithm("srft"), rl_cases.random_groups(seed), naive_losses.srft, seed)


def test_the_expert_takes_one_place_in_the_group():
    algorithm = rl_cases.algorithm("srft")
    assert (
        algorithm.options.needs_expert
        and algorithm.prefixes(rl_cases.random_groups(0)[0].problem, 1, 10, 0) == [[]] * 7
    )
