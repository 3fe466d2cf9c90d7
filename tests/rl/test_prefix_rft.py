"""Prefix-RFT: by hand, against a version written sample by sample, and the prefixes that it requests."""

import math

import numpy as np
import pytest
import torch

from pctrain.data.problems import Problem
from tests.helpers import naive_losses, rl_cases


def test_by_hand():
    # Prompt 0: a wrong rollout of one token; and one that continues the expert's [20, 21] by [30] and is right. A =
    # -1/2, +1/2. Prompt 1: both right: A = 0. Of the prefix's two tokens ceil(0.5 x 2) = 1 keeps its advantage, the one
    # with entropy 0.9. Ratio 1: losses +1/2; -0, -1/2, -1/2; 0, 0: sum -1/2 over 6 tokens = -0.083333. Gradients (+1/2,
    # 0, -1/2, -1/2, 0, 0) / 6.
    groups = [
        rl_cases.group(0, [0, 1], [[10], [30]], [[], [20, 21]], [20, 21, 22]),
        rl_cases.group(1, [1, 1], [[11], [12]], expert=[23]),
    ]
    algorithm = rl_cases.algorithm("prefix_rft", group=2, entropy_coef=0.0, entropy_share=0.5)
    rows = algorithm.rows(groups)
    assert [row.tokens.tolist()[3:] for row in rows] == [[10], [20, 21, 30], [11], [12]]
    assert rows[1].weights.tolist() == [0, 0, 0, 1, 1, 1] and rows[1].streams["expert"].tolist() == [0, 0, 0, 1, 1, 0]
    tokens = rl_cases.random_tokens([1, 3, 1, 1], seed=0, old=False)
    tokens[1].entropy = torch.tensor([0.4, 0.9, 1.5], dtype=torch.float64, requires_grad=True)
    rows = algorithm.finish(rl_cases.with_pass(rows, tokens, {"entropy"}))
    assert rows[1].streams["advantage"].tolist()[3:] == [0, 0.5, 0.5]
    loss, metrics = rl_cases.total(algorithm, rows, tokens)
    assert loss.item() == pytest.approx(-1 / 12)
    assert np.concatenate(rl_cases.gradients(loss, tokens)[::2]) == pytest.approx(
        np.array([0.5, 0, -0.5, -0.5, 0, 0]) / 6
    )
    assert metrics["expert"] == pytest.approx(2 / 6) and algorithm.report(metrics)["ratio"] == pytest.approx(1)


@pytest.mark.parametrize("share", [0.2, 0.5])
@pytest.mark.parametrize("seed", range(5))
def test_is_the_naive_version(seed, share):
    algorithm = rl_cases.algorithm("prefix_rft", updates=2, entropy_share=share)
    assert algorithm.streams_from_pass == {"entropy", "old_logprob"}
    groups = rl_cases.random_groups(seed, prefix=True)
    assert any(group.prefixes[-1] for group in groups)
    rl_cases.compare(algorithm, groups, lambda g, t: naive_losses.prefix_rft(g, t, share=share), seed)


def test_the_lower_share_falls_on_a_cosine():
    algorithm = rl_cases.algorithm("prefix_rft")
    shares = [algorithm.lower_share(step, 101) for step in (1, 26, 51, 101)]
    quarter = 0.05 + 0.9 * (1 + math.cos(math.pi / 4)) / 2
    assert shares == pytest.approx([0.95, quarter, 0.5, 0.05])
    assert algorithm.lower_share(1, 1) == pytest.approx(0.95)


def test_prefixes_are_a_function_of_seed_step_and_problem():
    algorithm = rl_cases.algorithm("prefix_rft")
    problems = [Problem(f"p{i}", i, "x", [3], "1", [*range(100, 200), 2]) for i in range(300)]
    *plain, first = algorithm.prefixes(problems[0], 1, 50, seed=1)
    assert plain == [[]] * 7 and first == problems[0].expert_ids[:95]  # at the first step the share is 95%
    lengths = [len(algorithm.prefixes(p, 50, 50, seed=1)[-1]) for p in problems]
    assert lengths == [len(algorithm.prefixes(p, 50, 50, seed=1)[-1]) for p in problems]
    assert lengths != [len(algorithm.prefixes(p, 49, 50, seed=1)[-1]) for p in problems]
    assert lengths != [len(algorithm.prefixes(p, 50, 50, seed=2)[-1]) for p in problems]
    assert (
        min(lengths) >= 5 and max(lengths) <= 95 and np.mean(lengths) == pytest.approx(50, abs=4)
    )  # uniform on [0.05, 0.95]
    skewed = rl_cases.algorithm("prefix_rft", beta_b=9)
    assert np.mean([len(skewed.prefixes(p, 50, 50, seed=1)[-1]) for p in problems]) == pytest.approx(5 + 90 / 10, abs=2)
    everything = rl_cases.algorithm("prefix_rft", low_start=1, high=1)
    assert everything.prefixes(problems[0], 1, 50, seed=1)[-1] == problems[0].expert_ids[:-1]  # never its EOS
