"""DAPO_d and DAPO_dc: the clips by hand and sample by sample, and the settings of each. (Against TRL: test_grpo.py.)"""

import math

import numpy as np
import pytest

from tests.helpers import naive_losses, rl_cases


def test_by_hand():
    # Two prompts, 3 tokens: rewards 1, 0 with one token each, and a prompt with rewards 1, 0 of which the second
    # sampled nothing. A = +-1/2 / (sample standard deviation sqrt(1/4 + 1/4) = 0.70711) = +-0.70711 (+ 1e-6 in the
    # divisor). Ratios 1.4, 1.4, 1.1 with A = +, -, +:
    #   +: min(1.4, 1.28) = 1.28, clipped   -: min(-1.4, -1.28) = -1.4   +: 1.1
    # Loss = -0.70711 (1.28 - 1.4 + 1.1) / 3 = -0.70711 x 0.98 / 3 = -0.230988; gradient = 0.70711 x (0, 1.4, -1.1) / 3.
    groups = [rl_cases.group(0, [1, 0], [[10], [11]]), rl_cases.group(1, [1, 0], [[12], []])]
    algorithm = rl_cases.algorithm("dapo_dc", updates=2)
    rows = algorithm.rows(groups)
    assert [row.streams["advantage"][-1] for row in rows] == pytest.approx(
        [0.7071058, -0.7071058, 0.7071058, -0.7071058], abs=1e-6
    )
    tokens = rl_cases.random_tokens([1, 1, 1, 0], seed=0, old=False)
    for of_row, ratio in zip(tokens[:3], (1.4, 1.4, 1.1), strict=True):
        of_row.old[0] -= math.log(ratio)
    loss, metrics = rl_cases.total(algorithm, rl_cases.with_pass(rows, tokens, {"old_logprob"}), tokens)
    assert loss.item() == pytest.approx(-0.230988, abs=1e-5)
    assert np.concatenate(rl_cases.gradients(loss, tokens)[::2]) == pytest.approx([0, 0.329983, -0.259272], abs=1e-5)
    assert metrics["clip_share"] == pytest.approx(1 / 3)


@pytest.mark.parametrize("seed", range(5))
def test_clip_higher_is_the_naive_version(seed):
    rl_cases.compare(
        rl_cases.algorithm("dapo_dc", updates=2),
        rl_cases.random_groups(seed),
        lambda g, t: naive_losses.grpo(g, t, low=0.2, high=0.28, std=True, entropy_coef=0.0),
        seed,
    )


@pytest.mark.parametrize("seed", range(3))
def test_dapo_d_is_grpo_on_the_groups_it_keeps(seed):
    rl_cases.compare(rl_cases.algorithm("dapo_d", updates=2), rl_cases.random_groups(seed), naive_losses.grpo, seed)


def test_the_parts_of_dapo_in_each():
    algorithms = {name: rl_cases.algorithm(name) for name in ("grpo", "dapo_d", "dapo_dc")}
    assert [a.options.dynamic_sampling for a in algorithms.values()] == [False, True, True]
    assert not any(a.options.needs_expert for a in algorithms.values())
    assert all(a.prefixes(None, 1, 10, 0) == [[]] * 8 for a in algorithms.values())
    assert [a.options.entropy_coef for a in algorithms.values()] == [0.001, 0.001, 0]
