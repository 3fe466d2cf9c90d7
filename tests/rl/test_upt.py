"""UPT: by hand, and against a version written prompt by prompt: SFT or GRPO by the number of right rollouts."""

import math

import numpy as np
import pytest
import torch

from tests.helpers import naive_losses, rl_cases


def test_by_hand():
    # Prompt 0: none of two right: SFT on the expert's one token, p = 0.25: 0.3 x -ln 0.25 = 0.3 x 1.386294 = 0.415888,
    # gradient -0.3. Prompt 1: one of two right, one token each, ratio 1: A = +-1/2: loss -1/2 and +1/2, gradients the
    # same. Mean over the 3 tokens: 0.415888 / 3 = 0.138629; gradients -0.1, -1/6, +1/6.
    groups = [
        rl_cases.group(0, [0, 0], [[10], [11]], expert=[20]),
        rl_cases.group(1, [1, 0], [[12], [13]], expert=[21]),
    ]
    algorithm = rl_cases.algorithm("upt", group=2, entropy_coef=0.0, sft_coef=0.3)
    rows = algorithm.rows(groups)
    assert [row.tokens.tolist()[3:] for row in rows] == [[20], [12], [13]]  # the wrong rollouts are dropped
    assert [row.streams["advantage"][-1] for row in rows] == [0, 0.5, -0.5]
    tokens = rl_cases.random_tokens([1, 1, 1], seed=0, old=False)
    tokens[0].logprob = torch.tensor([math.log(0.25)], dtype=torch.float64, requires_grad=True)
    loss, metrics = rl_cases.total(algorithm, rows, tokens)
    assert loss.item() == pytest.approx(0.138629, abs=1e-6)
    assert np.concatenate(rl_cases.gradients(loss, tokens)[::2]) == pytest.approx([-0.1, -1 / 6, 1 / 6], abs=1e-6)
    assert metrics["expert"] == pytest.approx(1 / 3) and algorithm.report(metrics)["ratio"] == pytest.approx(1)


@pytest.mark.parametrize("gamma", [0, 2])
@pytest.mark.parametrize("seed", range(4))
def test_is_the_naive_version(seed, gamma):
    algorithm = rl_cases.algorithm("upt", updates=2, gamma=gamma, sft_coef=0.3)
    metrics = rl_cases.compare(
        algorithm,
        rl_cases.random_groups(seed, prompts=6),
        lambda g, t: naive_losses.upt(g, t, gamma=gamma, coefficient=0.3),
        seed,
    )
    assert 0 < metrics["expert"] < 1


def test_the_published_normaliser_weighs_sft_by_its_own_tokens():
    """RL rows divide their sum by the longest response, SFT rows by their tokens."""
    groups = rl_cases.random_groups(0, prompts=5)
    algorithm = rl_cases.algorithm("upt", normaliser="published", entropy_coef=0.0, updates=2)

    def published(groups, tokens):
        members = [member for group in groups for member in algorithm.members(group)]
        of_expert = [t for m, t in zip(members, tokens, strict=True) if m.is_expert]
        by_rl = [t for m, t in zip(members, tokens, strict=True) if not m.is_expert]
        sft = -sum(t.logprob.sum() for t in of_expert) / sum(len(t.logprob) for t in of_expert)
        kept = [group for group in groups if any(group.rewards)]
        rl = naive_losses.grpo(kept, by_rl, entropy_coef=0) * sum(len(t.logprob) for t in by_rl) / rl_cases.MAX_RESPONSE
        return sft + rl

    rl_cases.compare(algorithm, groups, published, 0)


def test_advantages_with_k1_leave_the_experts_rows_alone():
    groups = rl_cases.random_groups(0)
    algorithm = rl_cases.algorithm("upt", kl_coef=0.5, kl_kind="k1")
    rows = algorithm.rows(groups)
    tokens = rl_cases.random_tokens(rl_cases.response_lengths(rows), 0)
    finished = algorithm.finish(rl_cases.with_pass(rows, tokens, algorithm.streams_from_pass))
    assert [row.streams["advantage"][-1] for row in finished if row.member.is_expert] == [0]


def test_a_step_that_trains_on_experts_alone_reports_no_ratios():
    """From a base model no rollout is right: every update is SFT, and there are no means over rollouts."""
    from pctrain.core import Update
    from pctrain.rl.update import mean_metrics

    algorithm = rl_cases.algorithm("upt")
    of_experts = algorithm.report(
        {"expert": 1.0, "entropy": 2.0, "ratio": 0.0, "clip_share": 0.0, "mismatch/mean": 0.0}
    )
    assert of_experts == {"expert": 1.0, "entropy": 2.0}
    of_both = algorithm.report({"expert": 0.5, "entropy": 1.0, "ratio": 0.5, "clip_share": 0.0, "mismatch/mean": 0.1})
    updates = [Update(1.0, metrics, 0.3, 1e-3, False) for metrics in (of_experts, of_both)]
    assert mean_metrics(updates) == pytest.approx(
        {
            "loss": 1.0,
            "grad_norm": 0.3,
            "lr": 1e-3,
            "expert": 0.75,
            "entropy": 1.5,
            "ratio": 1.0,
            "clip_share": 0.0,
            "mismatch/mean": 0.2,
            "skipped_updates": 0,
        }
    )
    assert set(mean_metrics(updates[:1])) == {"loss", "grad_norm", "lr", "expert", "entropy", "skipped_updates"}
    skipped = Update(float("nan"), of_both, float("nan"), 1e-3, True)
    assert mean_metrics([skipped]) == {"lr": 1e-3, "skipped_updates": 1}
