"""The policy loss against the independent implementations of TRL and Liger.

Each runs where it is installed (PCTRAIN_TEST_EXTRAS of launch/setup.sh).
"""

from __future__ import annotations

from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from pctrain_kernels import linear_policy_loss, policy_loss, reference
from tests.helpers.kernel_inputs import GRADIENT_TOLERANCE, make_inputs, relative
from tests.helpers.policy_cases import columns, logprobs

same_tokens = st.lists(
    st.tuples(logprobs, st.floats(0, 3), st.just(0.0), logprobs, logprobs, logprobs, st.just(False)),
    min_size=6,
    max_size=6,
)
same_options = {
    "rows": same_tokens,
    "advantages": st.tuples(st.floats(-2, 2), st.floats(-2, 2)),
    "clip_low": st.floats(0.01, 0.5),
    "clip_high": st.floats(0.01, 0.5),
    "dual_clip": st.none() | st.floats(1.6, 4),
    "kl_coef": st.sampled_from([0.0, 0.3]),
    "weighted": st.booleans(),
}
MASK = torch.tensor([[1, 1, 1], [1, 1, 0]], dtype=torch.float64)


def ours(rows, advantages, clip_low, clip_high, dual_clip, kl_coef, weighted):
    """Return (loss, d loss / d logprob) of a token mean over two responses of three tokens, and the others' inputs.

    The last token is masked.
    """
    logprob, entropy, streams = columns(rows)
    streams["advantage"] = torch.tensor(advantages, dtype=torch.float64).repeat_interleave(3)
    del streams["expert_mask"]
    if not weighted:
        del streams["rollout_logprob"]
    loss, _ = policy_loss(
        logprob,
        entropy,
        **streams,
        clip_low=clip_low,
        clip_high=clip_high,
        dual_clip=dual_clip,
        kl_coef=kl_coef,
        is_cap=2.0 if weighted else None,
    )
    loss = (loss * MASK.flatten()).sum() / MASK.sum()
    weights = (
        (streams["old_logprob"] - streams["rollout_logprob"]).exp().clamp(max=2.0).view(2, 3) if weighted else None
    )
    # Implementations may split gradients differently on an edge, so those cases are not compared.
    ratio = (logprob.detach() - streams["old_logprob"]).exp()
    assume(all(((ratio - edge).abs() > 1e-9).all() for edge in (1 - clip_low, 1 + clip_high, dual_clip or 1)))
    return loss, torch.autograd.grad(loss, logprob)[0], streams, weights


@given(**same_options)
def test_is_the_loss_of_trl(**case) -> None:
    pytest.importorskip("accelerate")
    pytest.importorskip("trl")
    from trl.trainer.grpo_trainer import GRPOTrainer

    loss, gradient, streams, weights = ours(**case)
    leaf = torch.tensor([row[0] for row in case["rows"]], dtype=torch.float64, requires_grad=True)
    trainer = SimpleNamespace(
        _get_per_token_logps_and_entropies=lambda *args, **kwargs: (leaf.view(2, 3), torch.zeros(2, 3), None),
        aux_loss_enabled=False,
        top_entropy_quantile=1.0,
        off_policy_mask_threshold=None,
        importance_sampling_level="token",
        beta=case["kl_coef"],
        epsilon_low=case["clip_low"],
        epsilon_high=case["clip_high"],
        loss_type="bnpo",
        use_vllm=weights is not None,
        vllm_importance_sampling_correction=True,
        current_gradient_accumulation_steps=1,
        _entropy_bonus_enabled=False,
        args=SimpleNamespace(use_bias_correction_kl=False, delta=case["dual_clip"]),
        model=SimpleNamespace(training=True),
        accelerator=SimpleNamespace(reduce=lambda tensor, reduction: tensor, gather=lambda tensor: tensor),
        _metrics=defaultdict(lambda: defaultdict(list)),
    )
    inputs = {
        "prompt_ids": torch.zeros(2, 1),
        "prompt_mask": torch.ones(2, 1),
        "completion_ids": torch.zeros(2, 3),
        "completion_mask": MASK,
    }
    inputs |= {
        "advantages": torch.tensor(case["advantages"], dtype=torch.float64),
        "importance_sampling_ratio": weights,
    }
    inputs |= {f"{name}_per_token_logps": streams[f"{name}_logprob"].view(2, 3) for name in ("old", "ref")}
    trl_loss = GRPOTrainer._compute_loss(trainer, None, inputs)
    torch.testing.assert_close(loss, trl_loss, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(gradient, torch.autograd.grad(trl_loss, leaf)[0], rtol=1e-12, atol=1e-12)


@given(**same_options)
def test_is_the_loss_of_liger(**case) -> None:
    liger = pytest.importorskip("liger_kernel.chunked_loss.grpo_loss")

    loss, gradient, streams, weights = ours(**case)
    leaf = torch.tensor([row[0] for row in case["rows"]], dtype=torch.float64, requires_grad=True)
    liger_loss, _ = liger.LigerFusedLinearGRPOFunction.ppo_loss_fn(
        leaf.view(2, 3),
        MASK,
        torch.tensor(case["advantages"], dtype=torch.float64),
        MASK,
        streams["ref_logprob"].view(2, 3),
        streams["old_logprob"].view(2, 3),
        epsilon_low=case["clip_low"],
        epsilon_high=case["clip_high"],
        beta=case["kl_coef"],
        loss_type="bnpo",
        vllm_is_ratio=weights,
        delta=case["dual_clip"],
    )
    torch.testing.assert_close(loss, liger_loss, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(gradient, torch.autograd.grad(liger_loss, leaf)[0], rtol=1e-12, atol=1e-12)


def test_the_linear_loss_is_that_of_liger() -> None:
    """From hidden states to gradients: two responses of eight tokens."""
    liger = pytest.importorskip("liger_kernel.chunked_loss.grpo_loss")

    hidden, weight, _ = make_inputs(16, 40)
    target, advantage = torch.arange(16) % 40, torch.tensor([1.5, -0.7])
    mask = torch.ones(2, 8)
    mask[1, 5:] = 0
    generator = torch.Generator().manual_seed(0)
    logprob = reference.linear_logprob_entropy(hidden, weight, target)[0].detach()
    old, ref = (logprob + 0.3 * torch.randn(16, generator=generator) for _ in range(2))
    got, _ = linear_policy_loss(
        hidden,
        weight,
        target,
        advantage=advantage.repeat_interleave(8),
        old_logprob=old,
        ref_logprob=ref,
        kl_coef=0.1,
        token_weight=mask.flatten(),
        denom=mask.sum(),
        chunk_tokens=5,
    )
    leaves = hidden.detach().view(2, 8, -1).requires_grad_(), weight.detach().requires_grad_()
    liger_loss = liger.LigerFusedLinearGRPOLoss(
        beta=0.1, compiled=False, epsilon_low=0.2, epsilon_high=0.28, loss_type="bnpo"
    )
    want, _ = liger_loss(
        leaves[0],
        leaves[1],
        target.view(2, 8),
        mask,
        advantage,
        ref_per_token_logps=ref.view(2, 8),
        old_per_token_logps=old.view(2, 8),
    )
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
    want_gradients = torch.autograd.grad(want, leaves)
    for gradient, expected in zip(torch.autograd.grad(got, (hidden, weight)), want_gradients, strict=True):
        assert relative(gradient, expected.view_as(gradient).double()) < 5 * GRADIENT_TOLERANCE  # both are fp32
