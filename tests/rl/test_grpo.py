"""GRPO: by hand, against TRL's loss on equal tensors, against a sample-by-sample version, and against REINFORCE."""

import math
from collections import defaultdict
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from tests.helpers import naive_losses, rl_cases

CLIP = 0.2


def test_by_hand():
    # Two prompts of two rollouts; 3 trained tokens in all of the first prompt's right rollout (2) and wrong one (1),
    # and 2 of the second's. Prompt 0: rewards 1, 0: mean 1/2, A = +1/2, -1/2.   Prompt 1: rewards 1, 1: A = 0.
    groups = [rl_cases.group(0, [1, 0], [[10, 2], [11]]), rl_cases.group(1, [1, 1], [[12], [13]])]
    algorithm = rl_cases.algorithm("grpo", entropy_coef=0.0, updates=2)
    rows = algorithm.rows(groups)
    assert [row.streams["advantage"][-1] for row in rows] == [0.5, -0.5, 0, 0]
    assert [row.weights.sum() for row in rows] == [2, 1, 1, 1]
    # Ratios of the tokens: 1.5 and 1 (A = 1/2), 1.5 (A = -1/2), 1 and 1 (A = 0).
    #   1.5, A = +1/2: min(0.75, 1.2 x 0.5 = 0.6) = 0.6, clipped: gradient 0
    #   1,   A = +1/2: 0.5, gradient r A = 0.5
    #   1.5, A = -1/2: min(-0.75, 1.2 x -0.5) = -0.75, gradient -0.75
    # Loss = -(0.6 + 0.5 - 0.75 + 0 + 0) / 5 = -0.07; gradient = -[0, 0.5], -[-0.75] = +0.75, 0, 0, each / 5.
    tokens = rl_cases.random_tokens([2, 1, 1, 1], seed=0, old=False)
    tokens[0].old[0] -= math.log(1.5)
    tokens[1].old[0] -= math.log(1.5)
    loss, metrics = rl_cases.total(algorithm, rl_cases.with_pass(rows, tokens, {"old_logprob"}), tokens)
    assert loss.item() == pytest.approx(-0.07, abs=1e-6)
    assert np.concatenate(rl_cases.gradients(loss, tokens)[::2]) == pytest.approx([0, -0.1, 0.15, 0, 0], abs=1e-6)
    assert metrics["ratio"] == pytest.approx((1.5 + 1 + 1.5 + 1 + 1) / 5) and metrics["clip_share"] == pytest.approx(
        1 / 5
    )


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("moved", [True, False])
def test_is_the_naive_version(seed, moved):
    rl_cases.compare(
        rl_cases.algorithm("grpo", updates=2), rl_cases.random_groups(seed), naive_losses.grpo, seed, moved
    )


def test_the_paper_divides_by_no_standard_deviation_unless_asked():
    rl_cases.compare(
        rl_cases.algorithm("grpo", std_normalise=True),
        rl_cases.random_groups(1),
        lambda g, t: naive_losses.grpo(g, t, std=True),
        1,
    )


@pytest.mark.parametrize("kind, kl", [("k2", lambda d: d * d / 2), ("k3", lambda d: torch.exp(d) - d - 1)])
def test_kl_losses(kind, kl):
    algorithm = rl_cases.algorithm("grpo", kl_coef=0.3, kl_kind=kind, entropy_coef=0.0)
    assert algorithm.streams_from_pass == {"ref_logprob"}
    metrics = rl_cases.compare(
        algorithm,
        rl_cases.random_groups(2),
        lambda g, t: naive_losses.grpo(g, t, entropy_coef=0, kl=lambda d: 0.3 * kl(d)),
        2,
    )
    assert metrics["kl"] > 0


def test_at_ratio_one_the_gradient_is_reinforce():
    algorithm, groups = rl_cases.algorithm("grpo", entropy_coef=0.0), rl_cases.random_groups(3)
    rows = algorithm.rows(groups)
    tokens = rl_cases.random_tokens(rl_cases.response_lengths(rows), 3)
    loss, metrics = rl_cases.total(algorithm, rows, tokens)
    reinforce = sum(
        -(row.streams["advantage"][-1].item() * t.logprob).sum() for row, t in zip(rows, tokens, strict=True)
    )
    reinforce = reinforce / sum(len(t.logprob) for t in tokens)
    for actual, expected in zip(rl_cases.gradients(loss, tokens), rl_cases.gradients(reinforce, tokens), strict=True):
        np.testing.assert_allclose(actual, expected, rtol=1e-12, atol=0)
    assert metrics["ratio"] == 1 and metrics["clip_share"] == 0


def trl_loss(algorithm, groups, tokens, *, beta, loss_type):
    """Return the loss of TRL's GRPOTrainer._compute_loss on right-padded tensors, with its graph to `tokens`."""
    pytest.importorskip("accelerate")
    pytest.importorskip("trl")
    from trl.trainer.grpo_trainer import GRPOTrainer

    def padded(name):
        return torch.nn.utils.rnn.pad_sequence([getattr(t, name) for t in tokens], batch_first=True)

    mask = torch.nn.utils.rnn.pad_sequence(
        [torch.ones(len(t.logprob), dtype=torch.float64) for t in tokens], batch_first=True
    )
    rewards = torch.tensor([g.rewards for g in groups], dtype=torch.float64)
    advantages = rewards - rewards.mean(1, keepdim=True)
    if algorithm.options.std_normalise:
        advantages = advantages / (rewards.std(1, keepdim=True) + 1e-6)
    high = algorithm.options.clip_high if algorithm.options.name == "dapo_dc" else algorithm.options.clip_low
    trainer = SimpleNamespace(
        _get_per_token_logps_and_entropies=lambda *a, **k: (padded("logprob"), torch.zeros_like(mask), None),
        aux_loss_enabled=False,
        top_entropy_quantile=1.0,
        off_policy_mask_threshold=None,
        importance_sampling_level="token",
        beta=beta,
        epsilon_low=algorithm.options.clip_low,
        epsilon_high=high,
        loss_type=loss_type,
        use_vllm=False,
        max_completion_length=rl_cases.MAX_RESPONSE,
        vllm_importance_sampling_correction=False,
        current_gradient_accumulation_steps=1,
        _entropy_bonus_enabled=False,
        model=SimpleNamespace(training=True),
        args=SimpleNamespace(use_bias_correction_kl=False, delta=None, steps_per_generation=1),
        accelerator=SimpleNamespace(reduce=lambda x, reduction: x, gather=lambda x: x, num_processes=1),
        _metrics=defaultdict(lambda: defaultdict(list)),
    )
    inputs = {
        "prompt_ids": torch.zeros(len(mask), 1),
        "prompt_mask": torch.ones(len(mask), 1),
        "completion_ids": torch.zeros_like(mask),
        "completion_mask": mask,
        "advantages": advantages.flatten(),
        "old_per_token_logps": padded("old"),
        "ref_per_token_logps": padded("ref"),
        "num_items_in_batch": mask.sum(),
    }
    return GRPOTrainer._compute_loss(trainer, None, inputs)


# TRL's names: bnpo and dapo divide by the tokens of the batch, grpo by sequence, dr_grpo by responses x longest
# response.
@pytest.mark.parametrize(
    "normaliser, loss_type", [("token", "bnpo"), ("token", "dapo"), ("sequence", "grpo"), ("fixed", "dr_grpo")]
)
@pytest.mark.parametrize("name", ["grpo", "dapo_d", "dapo_dc"])
@pytest.mark.parametrize("kl_coef", [0.0, 0.2])
def test_is_the_loss_of_trl(name, normaliser, loss_type, kl_coef):
    algorithm = rl_cases.algorithm(name, normaliser=normaliser, kl_coef=kl_coef, entropy_coef=0.0)
    for seed in range(3):
        rl_cases.compare(
            algorithm,
            rl_cases.random_groups(seed),
            lambda g, t: trl_loss(algorithm, g, t, beta=kl_coef, loss_type=loss_type),
            seed,
        )
