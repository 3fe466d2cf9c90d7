"""The options that algorithms share: advantages, normalisers, KL, dual clip, overlong penalty, importance weights."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pctrain.data.rows import make_row
from pctrain.rl.algorithms.base import overlong_share
from pctrain.rl.algorithms.normaliser import normalise
from pctrain.rl.batch import split
from tests.helpers import naive_losses, rl_cases


def grpo_advantages(rewards, **options):
    return rl_cases.algorithm("grpo", **options).advantages(rewards)


def test_advantages_by_hand():
    # One prompt, four rollouts, one right: mean 1/4, sample standard deviation sqrt((9 + 1 + 1 + 1) / 16 / 3) = 1/2.
    rewards = np.array([1, 0, 0, 0])
    assert grpo_advantages(rewards, std_normalise=False).tolist() == [0.75, -0.25, -0.25, -0.25]
    np.testing.assert_allclose(grpo_advantages(rewards, std_normalise=True), [1.5, -0.5, -0.5, -0.5], rtol=1e-5)
    # Leave-one-out: 1 - 0 of the others; 0 - 1/3.
    np.testing.assert_allclose(grpo_advantages(rewards, leave_one_out=True), [1, -1 / 3, -1 / 3, -1 / 3])


@given(
    st.lists(st.lists(st.sampled_from([0.0, 1.0]), min_size=5, max_size=5), min_size=1, max_size=6),
    st.booleans(),
    st.booleans(),
)
def test_advantages_of_a_group_sum_to_zero_and_vanish_where_rewards_are_equal(rewards, normalise, leave_one_out):
    advantages = grpo_advantages(np.array(rewards), std_normalise=normalise, leave_one_out=leave_one_out)
    np.testing.assert_allclose(advantages.sum(1), 0, atol=1e-9)
    for row, group in zip(rewards, advantages, strict=True):
        assert (len(set(row)) > 1) == bool(np.abs(group).max() > 0.1)
        others = [(sum(row) - r) / 4 for r in row]
        if leave_one_out and not normalise:
            np.testing.assert_allclose(group, np.array(row) - others, atol=1e-12)


def test_rows_by_hand():
    groups = [rl_cases.group(0, [1, 0], [[10, 20], [11, 21, 2]]), rl_cases.group(1, [0, 0], [[12], [13]])]
    rows = rl_cases.algorithm("grpo").rows(groups)
    assert [row.tokens.tolist() for row in rows] == [
        [7, 8, 9, 10, 20],
        [7, 8, 9, 11, 21, 2],
        [7, 8, 9, 12],
        [7, 8, 9, 13],
    ]
    assert [row.weights.tolist() for row in rows] == [[0, 0, 0, 1, 1], [0, 0, 0, 1, 1, 1], [0, 0, 0, 1], [0, 0, 0, 1]]
    assert [row.streams["advantage"][-1] for row in rows] == [0.5, -0.5, 0, 0]


def test_minibatches_partition_the_rows():
    rows = list(range(10))
    assert [len(part) for part in split(rows, 4)] == [2, 3, 3, 2]
    assert np.concatenate(split(rows, 4)).tolist() == rows
    assert split(rows[:2], 4) == [[0], [1]]


def test_normalisers_by_hand():
    # Token losses 1, 2 | 3: token mean 6/3; sequence mean (1.5 + 3) / 2; fixed 6 / (2 x 12); published 6 / 12.
    rows = [make_row([7], [1, 2]), make_row([7], [3])]
    losses = [np.array([0, 1, 2]), np.array([0, 3])]
    found = {}
    for kind in ("token", "sequence", "fixed", "published"):
        scaled, denominator = normalise(rows, kind, rl_cases.MAX_RESPONSE)
        total = sum((row.weights * loss).sum() for row, loss in zip(scaled, losses, strict=True))
        found[kind] = total / (sum(row.weights.sum() for row in scaled) if denominator is None else denominator)
    assert found == pytest.approx({"token": 2, "sequence": 2.25, "fixed": 0.25, "published": 0.5})


def test_overlong_penalty_by_hand():
    # Longest response 12, buffer 4: from 8 tokens on, linearly up to 1 at 12.
    assert overlong_share(np.array([1, 8, 9, 11, 12]), 12, 4).tolist() == [0, 0, 0.25, 0.75, 1]
    assert overlong_share(np.array([12]), 12, 0).tolist() == [0]
    # Rewards 1 and 1, the second 10 tokens long: 1 and 1 - 0.5 x 2/4 = 0.75; A = +-0.125.
    groups = [rl_cases.group(0, [1, 1], [[10], list(range(10, 20))])]
    rows = rl_cases.algorithm("grpo", overlong_buffer=4, overlong_weight=0.5).rows(groups)
    assert [row.streams["advantage"][-1] for row in rows] == [0.125, -0.125]
    # A prefix is part of the response.
    groups = [rl_cases.group(0, [1, 1], [[10], [15]], [[], list(range(10, 19))], list(range(10, 20)))]
    rows = rl_cases.algorithm("prefix_rft", overlong_buffer=4, overlong_weight=0.5).rows(groups)
    assert [row.streams["advantage"][-1] for row in rows] == [0.125, -0.125]


def test_k1_is_subtracted_from_the_reward():
    # Two rollouts, rewards 1 and 0; sum of old - ref: (-0.5 + 1.0) = 0.5 over one token, and -1.5 + 0.25 = -1.25 over
    # another. Rewards 1 - 0.1 x 0.5 = 0.95 and 0 + 0.1 x 1.25 = 0.125: A = +-0.4125.
    groups = [rl_cases.group(0, [1, 0], [[10], [11]])]
    algorithm = rl_cases.algorithm("grpo", kl_coef=0.1, kl_kind="k1", entropy_coef=0.0)
    assert algorithm.streams_from_pass == {"old_logprob", "ref_logprob"}
    rows, tokens = algorithm.rows(groups), rl_cases.random_tokens([1, 1], seed=0)
    for of_row, old, ref in zip(tokens, (-0.5, -1.5), (-1.0, -0.25), strict=True):
        of_row.old[0], of_row.ref[0] = old, ref
    finished = algorithm.finish(rl_cases.with_pass(rows, tokens, algorithm.streams_from_pass))
    assert [row.streams["advantage"][-1] for row in finished] == pytest.approx([0.4125, -0.4125])
    # The KL is no loss term: with the ratio at 1 the loss is -A, and so is its gradient.
    for of_row in tokens:
        of_row.old[0] = of_row.logprob[0].item()
    for row, of_row in zip(finished, tokens, strict=True):
        row.streams["old_logprob"][-1] = of_row.logprob[0].item()
    loss, metrics = rl_cases.total(algorithm, finished, tokens)
    assert np.concatenate(rl_cases.gradients(loss, tokens)[::2]) == pytest.approx([-0.4125 / 2, 0.4125 / 2], rel=1e-5)
    assert metrics["kl"] > 0  # k3, as a metric


def test_k1_of_a_prefix_is_not_the_policys():
    groups = [rl_cases.group(0, [1, 0], [[10], [30]], [[], [20, 21]], [20, 21, 22])]
    algorithm = rl_cases.algorithm("prefix_rft", group=2, kl_coef=0.1, kl_kind="k1", entropy_share=1)
    rows, tokens = algorithm.rows(groups), rl_cases.random_tokens([1, 3], seed=0)
    finished = algorithm.finish(rl_cases.with_pass(rows, tokens, algorithm.streams_from_pass))
    k1 = [(tokens[0].old[0] - tokens[0].ref[0]).item(), (tokens[1].old[2] - tokens[1].ref[2]).item()]
    rewards = np.array([1 - 0.1 * k1[0], 0 - 0.1 * k1[1]])
    assert [row.streams["advantage"][-1] for row in finished] == pytest.approx(list(rewards - rewards.mean()), rel=1e-5)


def test_dual_clip_bounds_the_ratio_of_bad_tokens():
    groups, algorithm = (
        [rl_cases.group(0, [1, 0], [[10], [11]])],
        rl_cases.algorithm("grpo", dual_clip=3.0, entropy_coef=0.0),
    )
    rows, tokens = algorithm.rows(groups), rl_cases.random_tokens([1, 1], seed=0, old=False)
    for of_row in tokens:
        of_row.old[0] -= math.log(5)
    loss, metrics = rl_cases.total(algorithm, rl_cases.with_pass(rows, tokens, {"old_logprob"}), tokens)
    # Ratios 5: +1/2 is clipped at 1.2; -1/2 at 3 (without: 5). Loss -(0.6 - 1.5) / 2, no gradient.
    assert loss.item() == pytest.approx(0.45, rel=1e-5) and not np.concatenate(rl_cases.gradients(loss, tokens)).any()
    assert metrics["dual_clip_share"] == pytest.approx(0.5)


def test_the_entropy_bonus():
    groups, algorithm = rl_cases.random_groups(0), rl_cases.algorithm("dapo_dc", entropy_coef=0.25)
    rl_cases.compare(algorithm, groups, lambda g, t: naive_losses.grpo(g, t, high=0.28, std=True, entropy_coef=0.25), 0)


def weights_by_hand(groups, tokens, *, level, cap):
    """Return the importance weight of each token of each row, from the log-probs themselves."""
    found, rows = [], iter(tokens)
    for group in groups:
        for completion in group.completions:
            log_ratio = next(rows).old.numpy() - np.array(completion.logprobs)
            found.append(
                np.minimum(np.exp(log_ratio if level == "token" else np.full(len(log_ratio), log_ratio.sum())), cap)
            )
    return found


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("updates", [1, 2])
def test_importance_weights_multiply_the_surrogate(level, updates):
    groups, cap = rl_cases.random_groups(4), 1.3
    algorithm = rl_cases.algorithm("grpo", is_correction=level, is_cap=cap, updates=updates, entropy_coef=0.0)
    assert algorithm.streams_from_pass == ({"old_logprob"} if updates > 1 or level == "sequence" else set())

    def naive(groups, tokens):
        weights, total, rows = weights_by_hand(groups, tokens, level=level, cap=cap), 0.0, iter(range(len(tokens)))
        for group in groups:
            for reward in group.rewards:
                i = next(rows)
                advantage = reward - sum(group.rewards) / len(group.rewards)
                ratio = torch.exp(tokens[i].logprob - tokens[i].old)
                surrogate = torch.min(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage)
                total = total - (torch.from_numpy(weights[i]) * surrogate).sum()
        return total / sum(len(t.logprob) for t in tokens)

    metrics = rl_cases.compare(algorithm, groups, naive, 4, moved=updates > 1)
    assert 0.3 < metrics["is_weight"] <= cap


@pytest.mark.parametrize("name", ["luffy", "srft", "upt", "prefix_rft"])
@pytest.mark.parametrize("level", ["token", "sequence"])
def test_an_experts_tokens_have_no_importance_weight(name, level):
    """Where engine and learner agree, the corrected loss is the plain one, also on rows that were not sampled."""
    groups = rl_cases.random_groups(5, prefix=name == "prefix_rft")
    results = {}
    for correction in ("none", level):
        algorithm = rl_cases.algorithm(name, is_correction=correction, updates=2)
        rows = algorithm.rows(groups)
        tokens = rl_cases.random_tokens(rl_cases.response_lengths(rows), 5)
        if correction != "none":
            for row, of_row in zip(rows, tokens, strict=True):
                engine = row.streams["rollout_logprob"]
                sampled = ~np.isnan(engine)
                assert not (sampled & (row.streams["expert"] > 0)).any()
                engine[sampled] = np.concatenate([np.zeros(3), of_row.old.numpy()])[sampled]
        rows = algorithm.finish(rl_cases.with_pass(rows, tokens, algorithm.streams_from_pass))
        loss, metrics = rl_cases.total(algorithm, rows, tokens)
        results[correction] = loss.item(), np.concatenate(rl_cases.gradients(loss, tokens))
        if correction != "none":
            assert algorithm.report(metrics)["is_weight"] == pytest.approx(1, abs=1e-5)
    assert results[level][0] == pytest.approx(results["none"][0], rel=1e-5)
    np.testing.assert_allclose(results[level][1], results["none"][1], rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize(
    "correction, reader",
    [("token", "rl.algorithm.is_correction = token needs"), (None, "the metrics mismatch/.* need")],
)
def test_an_engine_that_returns_nan_is_an_error_that_names_the_reader_of_its_logprobs(correction, reader):
    groups = [rl_cases.group(0, [1, 0], [[10], [11]], logprobs=[[math.nan], [-1.0]])]
    with pytest.raises(ValueError, match=f"p0: .* not a finite number for rollout 0 .* {reader} a finite log-prob"):
        rl_cases.algorithm("grpo", is_correction=correction).rows(groups)
