"""The loss of `grpo.py`, which training uses, is `pctrain_kernels.policy_loss` to the last bit.

The kernels stand alone with torch and triton, so they have a definition of their own. Both do the same operations in
the same order, and nothing is rounded in between: equality is exact, for values and for gradients.
"""

import numpy as np
import pytest
import torch

from pctrain_kernels import linear_policy_loss, linear_token_loss, policy_loss
from tests.helpers import rl_cases

N = 400
CASES = {
    "grpo": ("grpo", {"entropy_coef": 0.01}, {"clip_high": 0.2}),
    "dapo_dc": ("dapo_dc", {}, {"clip_high": 0.28}),
    "k2": ("dapo_d", {"kl_coef": 0.1, "kl_kind": "k2"}, {"clip_high": 0.2, "kl_coef": 0.1, "kl_kind": "k2"}),
    "k3": ("dapo_dc", {"kl_coef": 0.1, "dual_clip": 3.0}, {"clip_high": 0.28, "kl_coef": 0.1, "dual_clip": 3.0}),
    "weighted": ("dapo_dc", {"is_correction": "token", "is_cap": 1.5}, {"clip_high": 0.28, "is_cap": 1.5}),
    "expert": ("luffy", {"is_correction": "token"}, {"clip_low": None, "clip_high": None, "is_cap": 2.0}),
}


def _streams(name, options):
    """Streams of N tokens with ratios on both sides of every bound; an expert's tokens have no rollout_logprob."""
    rng = np.random.default_rng(0)
    logprob = -3 * rng.random(N)
    streams = {"advantage": rng.normal(size=N), "old_logprob": logprob + rng.normal(0, 0.5, N)}
    if options.get("kl_coef"):
        streams["ref_logprob"] = logprob + rng.normal(0, 0.3, N)
    if options.get("is_correction") == "token":
        streams["rollout_logprob"] = streams["old_logprob"] + rng.normal(0, 0.5, N)
    if name == "luffy":
        streams["expert"] = (rng.random(N) < 0.3).astype(float)
        streams["rollout_logprob"] = np.where(streams["expert"] > 0, np.nan, streams["rollout_logprob"])
    tensors = {key: torch.tensor(value, dtype=torch.float32) for key, value in streams.items()}
    return torch.tensor(logprob, dtype=torch.float32), torch.tensor(2 * rng.random(N), dtype=torch.float32), tensors


def _kernel_arguments(algorithm, streams, options):
    arguments = {**streams, **options, "entropy_coef": algorithm.options.entropy_coef}
    if "expert" in streams:
        arguments["expert_mask"] = arguments.pop("expert") > 0
        arguments["expert_shaping"] = 0.1
    return arguments


def _with_gradients(loss, logprob, entropy):
    logprob, entropy = logprob.clone().requires_grad_(), entropy.clone().requires_grad_()
    value, metrics = loss(logprob, entropy)
    gradients = torch.autograd.grad(value.sum(), (logprob, entropy), allow_unused=True)
    return value.detach(), metrics, gradients


@pytest.mark.parametrize("moved", [True, False])
@pytest.mark.parametrize("case", CASES)
def test_values_gradients_and_metrics_are_equal_bit_for_bit(case, moved):
    name, options, kernel_options = CASES[case]
    algorithm = rl_cases.algorithm(name, **options)
    logprob, entropy, streams = _streams(name, options)
    if not moved:
        del streams["old_logprob"]
    arguments = _kernel_arguments(algorithm, streams, kernel_options)
    actual, actual_metrics, actual_gradients = _with_gradients(
        lambda lp, h: algorithm.loss(lp, h, streams), logprob, entropy
    )
    expected, expected_metrics, expected_gradients = _with_gradients(
        lambda lp, h: policy_loss(lp, h, **arguments), logprob, entropy
    )
    assert torch.equal(actual, expected)
    for mine, other in zip(actual_gradients, expected_gradients, strict=True):
        assert (mine is None and other is None) or torch.equal(mine, other)
    assert torch.equal(actual_metrics["clip_share"], expected_metrics["clipped_low"] + expected_metrics["clipped_high"])
    for key in {"ratio", "entropy", "kl", "is_weight", "expert"} & set(actual_metrics):
        assert torch.equal(actual_metrics[key], expected_metrics[key]), key
    if moved and name != "luffy":
        assert 0.05 < actual_metrics["clip_share"].mean() < 0.95
    if "dual_clip" in options and moved:
        assert torch.equal(actual_metrics["dual_clip_share"], expected_metrics["clipped_dual"])


def test_through_the_fused_head_too():
    """Training puts the loss into `linear_token_loss`; `linear_policy_loss` is the same head with the kernels' loss."""
    algorithm = rl_cases.algorithm("dapo_dc", kl_coef=0.1)
    generator = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(N, 16, generator=generator), torch.randn(40, 16, generator=generator)
    target = torch.randint(0, 40, (N,), generator=generator)
    _, _, streams = _streams("dapo_dc", {"kl_coef": 0.1})
    results = []
    for fused, arguments in (
        (linear_token_loss, {"token_loss": algorithm.loss, "streams": streams}),
        (linear_policy_loss, {**streams, "kl_coef": 0.1}),
    ):
        inputs = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        loss, _ = fused(*inputs, target, denom=float(N), **arguments)
        loss.backward()
        results.append((loss.detach(), inputs[0].grad, inputs[1].grad))
    assert all(torch.equal(actual, expected) for actual, expected in zip(*results, strict=True))
