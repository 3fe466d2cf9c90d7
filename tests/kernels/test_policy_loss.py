"""`policy_loss` against the formula written out token by token; the linear losses against op 4."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor

from pctrain_kernels import linear_cross_entropy, linear_policy_loss, linear_token_loss, policy_loss, reference
from pctrain_kernels import policy as policy_module
from tests.helpers.kernel_inputs import GRADIENT_TOLERANCE, VALUE_TOLERANCE, double, make_inputs, relative
from tests.helpers.policy_cases import columns, logprobs

DEFAULTS = {
    "clip_low": 0.2,
    "clip_high": 0.28,
    "dual_clip": None,
    "kl_coef": 0.0,
    "kl_kind": "k3",
    "entropy_coef": 0.0,
    "is_cap": None,
    "expert_shaping": None,
}


def by_hand(
    lp, entropy, *, advantage, old_logprob=None, ref_logprob=None, rollout_logprob=None, expert_mask=False, **options
):
    """Return (loss, d loss / d logprob, d loss / d entropy) of one token, case by case in Python floats."""
    o = SimpleNamespace(**(DEFAULTS | options))
    old = lp if old_logprob is None else old_logprob
    if expert_mask:
        p = math.exp(lp)
        loss, slope = (
            -p / (p + o.expert_shaping) * advantage,
            -o.expert_shaping * p / (p + o.expert_shaping) ** 2 * advantage,
        )
    else:
        r = math.exp(lp - old)
        lowest = -math.inf if o.clip_low is None else 1 - o.clip_low
        highest = math.inf if o.clip_high is None else 1 + o.clip_high
        if advantage > 0:
            value, slope = (r, r) if r <= highest else (highest, 0.0)
        elif r < lowest:
            value, slope = lowest, 0.0
        elif o.dual_clip is not None and r > o.dual_clip:
            value, slope = o.dual_clip, 0.0
        else:
            value, slope = r, r
        weight = 1.0 if o.is_cap is None else min(math.exp(old - rollout_logprob), o.is_cap)
        loss, slope = -weight * value * advantage, -weight * slope * advantage
    if o.kl_coef:
        d = ref_logprob - lp
        loss += o.kl_coef * (d * d / 2 if o.kl_kind == "k2" else math.exp(d) - d - 1)
        slope += o.kl_coef * (-d if o.kl_kind == "k2" else 1 - math.exp(d))
    return loss - o.entropy_coef * entropy, slope, -o.entropy_coef


# One token: logprob, entropy, advantage, log-probs of old policy, reference and sampler, and whether it is an expert's.
tokens = st.lists(
    st.tuples(logprobs, st.floats(0, 3), st.floats(-2, 2), logprobs, logprobs, logprobs, st.booleans()),
    min_size=1,
    max_size=12,
)
clips = st.none() | st.floats(0, 0.5)


@given(
    rows=tokens,
    clip_low=clips,
    clip_high=clips,
    dual_clip=st.none() | st.floats(1.6, 4),
    kl=st.sampled_from([0.0, 0.3]),
    kl_kind=st.sampled_from(["k2", "k3"]),
    entropy_coef=st.sampled_from([0.0, 0.2]),
    is_cap=st.none() | st.floats(0.5, 3),
    shaping=st.none() | st.floats(0.01, 1),
    old=st.booleans(),
)
def test_any_options_follow_the_formula(
    rows, clip_low, clip_high, dual_clip, kl, kl_kind, entropy_coef, is_cap, shaping, old
) -> None:
    logprob, entropy, streams = columns(rows)
    for name, wanted in {"old_logprob": old, "rollout_logprob": is_cap, "expert_mask": shaping}.items():
        if wanted in (None, False):
            del streams[name]
    options = {
        "clip_low": clip_low,
        "clip_high": clip_high,
        "dual_clip": dual_clip,
        "kl_coef": kl,
        "kl_kind": kl_kind,
        "entropy_coef": entropy_coef,
        "is_cap": is_cap,
        "expert_shaping": shaping,
    }
    if old:  # a ratio on an edge has two slopes; test_clip_edges covers those
        ratio = (logprob.detach() - streams["old_logprob"]).exp()
        edges = [1 - (clip_low or 0), 1 + (clip_high or 0), dual_clip or 1]
        assume(all(((ratio - edge).abs() > 1e-9).all() for edge in edges))
    else:
        assume(clip_low != 0 and clip_high != 0)
    loss, metrics = policy_loss(logprob, entropy, **streams, **options)
    dlogprob, dentropy = torch.autograd.grad(loss.sum() + 0 * entropy.sum(), (logprob, entropy))
    for i in range(len(rows)):
        of_token = {name: stream[i].item() for name, stream in streams.items()}
        want = by_hand(logprob[i].item(), entropy[i].item(), **of_token, **options)
        assert (loss[i].item(), dlogprob[i].item(), dentropy[i].item()) == pytest.approx(want, rel=1e-12, abs=1e-12)
    assert not any(value.requires_grad for value in metrics.values()) and all(
        value.shape == loss.shape for value in metrics.values()
    )


def one(ratio: float, advantage: float, **options) -> tuple[float, float, dict[str, float]]:
    """Return (loss, d loss / d ratio, metrics) of a token with that ratio."""
    logprob = torch.tensor([0.0], dtype=torch.float64, requires_grad=True)
    old = torch.tensor([-math.log(ratio)], dtype=torch.float64)
    loss, metrics = policy_loss(
        logprob, None, advantage=torch.tensor([advantage], dtype=torch.float64), old_logprob=old, **options
    )
    (slope,) = torch.autograd.grad(loss.sum(), logprob)
    return loss.item(), slope.item() / ratio, {name: value.item() for name, value in metrics.items()}


def test_clip_edges() -> None:
    """With bounds 0.5 and 1.5, exact in binary, a token on the bound still counts in full, and beyond it not at all."""
    options = {"clip_low": 0.5, "clip_high": 0.5, "dual_clip": 2.0}
    cases = {  # ratio, advantage: loss / -advantage, slope / -advantage, which clip is counted
        (0.25, 1.0): (0.25, 1, None),
        (0.5, 1.0): (0.5, 1, None),
        (1.5, 1.0): (1.5, 1, None),
        (1.6, 1.0): (1.5, 0, "clipped_high"),
        (0.25, -1.0): (0.5, 0, "clipped_low"),
        (0.5, -1.0): (0.5, 1, None),
        (1.6, -1.0): (1.6, 1, None),
        (3.0, -1.0): (2, 0, "clipped_dual"),
    }
    for (ratio, advantage), (value, slope, which) in cases.items():
        loss, got_slope, metrics = one(ratio, advantage, **options)
        assert ratio not in (0.5, 1.5) or metrics["ratio"] == ratio  # an edge is an edge
        assert (loss, got_slope) == pytest.approx((-advantage * value, -advantage * slope))
        assert metrics == pytest.approx(
            {"ratio": ratio} | {name: float(name == which) for name in ("clipped_low", "clipped_high", "clipped_dual")}
        )
    for ratio in (0.25, 0.5, 1.0, 1.5, 3.0):
        loss, slope, metrics = one(ratio, 0.0, **options)
        assert loss == slope == 0 and not any(metrics[name] for name in ("clipped_low", "clipped_high", "clipped_dual"))


def test_without_old_logprob_the_ratio_is_one_and_the_gradient_reinforce() -> None:
    logprob = torch.tensor([-0.1, -2.0, -3.0], requires_grad=True)
    advantage = torch.tensor([0.5, -1.0, 2.0])
    loss, metrics = policy_loss(logprob, None, advantage=advantage)
    loss.sum().backward()
    assert torch.equal(logprob.grad, -advantage) and metrics["ratio"].tolist() == [1, 1, 1]


def test_metrics() -> None:
    names = ["ratio", "clipped_low", "clipped_high", "clipped_dual", "is_weight", "expert", "kl", "entropy"]
    generator = torch.Generator().manual_seed(0)
    logprob, old, ref, rollout, advantage = (
        torch.randn(200, generator=generator, dtype=torch.float64) for _ in range(5)
    )
    expert, entropy = torch.arange(200) % 5 == 0, torch.rand(200, generator=generator)
    loss, metrics = policy_loss(
        logprob,
        entropy,
        advantage=advantage,
        old_logprob=old,
        ref_logprob=ref,
        rollout_logprob=rollout,
        expert_mask=expert,
        dual_clip=3.0,
        is_cap=2.0,
        expert_shaping=0.1,
    )
    assert sorted(metrics) == sorted(names)
    own, ratio = (~expert).double(), (logprob - old).exp()
    want = {
        "ratio": own * ratio,
        "clipped_low": own * (ratio < 0.8) * (advantage < 0),
        "clipped_high": own * (ratio > 1.28) * (advantage > 0),
        "clipped_dual": own * (ratio > 3) * (advantage < 0),
        "is_weight": own * (old - rollout).exp().clamp(max=2),
        "expert": 1 - own,
        "kl": (ref - logprob).exp() - (ref - logprob) - 1,
        "entropy": entropy.double(),
    }
    for name, value in want.items():
        assert value.sum() > 0
        torch.testing.assert_close(metrics[name], value, rtol=1e-12, atol=1e-12)
    # The KL to the reference is reported but not trained on.
    assert torch.equal(
        loss,
        policy_loss(
            logprob,
            entropy,
            advantage=advantage,
            old_logprob=old,
            rollout_logprob=rollout,
            dual_clip=3.0,
            expert_mask=expert,
            is_cap=2.0,
            expert_shaping=0.1,
        )[0],
    )


def test_streams_of_an_expert_that_mean_nothing_do_no_harm() -> None:
    logprob = torch.tensor([-1.0, -1.0], requires_grad=True)
    nothing = torch.tensor([-0.9, torch.nan])
    loss, metrics = policy_loss(
        logprob,
        None,
        advantage=torch.ones(2),
        old_logprob=nothing,
        rollout_logprob=-nothing,
        is_cap=2.0,
        expert_mask=torch.tensor([False, True]),
        expert_shaping=0.1,
    )
    loss.sum().backward()
    assert loss.isfinite().all() and logprob.grad.isfinite().all() and metrics["ratio"][1] == 0


@pytest.mark.parametrize(
    "name, options",
    [
        ("logprob", {}),
        ("advantage", {}),
        ("old_logprob", {}),
        ("ref_logprob", {"kl_coef": 0.1}),
        ("rollout_logprob", {"is_cap": 2.0}),
    ],
)
def test_non_finite_values_are_not_hidden(name: str, options: dict) -> None:
    values = {key: torch.full((3,), -1.0) for key in {"logprob", "advantage", "old_logprob", name}}
    values[name][1] = torch.nan
    logprob = values.pop("logprob").requires_grad_()
    loss, _ = policy_loss(logprob, None, **values, **options)
    (gradient,) = torch.autograd.grad(loss.sum(), logprob)
    assert loss.isfinite().tolist() == gradient.isfinite().tolist() == [True, False, True]


def test_streams_are_constants() -> None:
    logprob = torch.full((3,), -1.0, requires_grad=True)
    streams = {
        name: torch.full((3,), -0.5, requires_grad=True)
        for name in ("advantage", "old_logprob", "ref_logprob", "rollout_logprob")
    }
    loss, _ = policy_loss(logprob, None, **streams, kl_coef=0.1, is_cap=2.0)
    assert torch.autograd.grad(loss.sum(), list(streams.values()), allow_unused=True) == (None,) * 4


BAD = [
    ({"kl_kind": "k1"}, "'k1' is no loss"),
    ({"kl_kind": "k4"}, "kl_kind"),
    ({"clip_low": -0.1}, "clip_low"),
    ({"clip_high": -0.1}, "clip_high"),
    ({"dual_clip": 1.0}, "dual_clip"),
    ({"kl_coef": -0.1}, "kl_coef"),
    ({"kl_coef": 0.1}, "kl_coef needs ref_logprob"),
    ({"rollout_logprob": torch.zeros(8)}, "only rollout_logprob"),
    ({"is_cap": 2.0}, "only is_cap"),
    ({"is_cap": 0.0, "rollout_logprob": torch.zeros(8)}, "is_cap must be above 0"),
    ({"expert_mask": torch.zeros(8, dtype=torch.bool)}, "only expert_mask"),
    ({"expert_shaping": 0.1}, "only expert_shaping"),
    ({"expert_shaping": 0.0, "expert_mask": torch.zeros(8, dtype=torch.bool)}, "expert_shaping must be above 0"),
    ({"expert_shaping": 0.1, "expert_mask": torch.zeros(8)}, "bool"),
    ({"clip_low": math.nan}, "clip_low"),
    ({"advantage": torch.zeros(7)}, "advantage"),
]


@pytest.mark.parametrize("change, message", BAD)
def test_mismatched_arguments_are_refused(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        policy_loss(torch.zeros(8), torch.zeros(8), **({"advantage": torch.zeros(8)} | change))
    hidden, weight, target = make_inputs(8, 20)
    with pytest.raises(ValueError, match=message):
        linear_policy_loss(hidden, weight, target, denom=1, **({"advantage": torch.zeros(8)} | change))


def test_an_entropy_bonus_needs_the_entropy() -> None:
    hidden, weight, target = make_inputs(8, 20)
    with pytest.raises(ValueError, match="entropy_coef needs the entropy"):
        policy_loss(torch.zeros(8), None, advantage=torch.zeros(8), entropy_coef=0.1)
    with pytest.raises(ValueError, match="entropy_coef needs the entropy"):
        linear_policy_loss(
            hidden, weight, target, advantage=torch.zeros(8), denom=1, entropy_coef=0.1, want_entropy=False
        )


def head_inputs(tokens: int = 33, vocab: int = 101):
    """Return hidden, weight, target, streams that meet every bound for some tokens, and weights with zeros."""
    hidden, weight, target = make_inputs(tokens, vocab)
    logprob = reference.linear_logprob_entropy(hidden, weight, target)[0].detach()
    noise = torch.randn(4, tokens, generator=torch.Generator().manual_seed(3))
    streams = {
        name: logprob + 0.5 * part
        for name, part in zip(("old_logprob", "ref_logprob", "rollout_logprob"), noise, strict=False)
    }
    streams |= {"advantage": 2 * noise[3], "expert_mask": torch.arange(tokens) % 4 == 0}
    return hidden, weight, target, streams, (torch.arange(tokens) % 3).float()


EVERY_OPTION = {
    "dual_clip": 2.0,
    "kl_coef": 0.1,
    "kl_kind": "k2",
    "entropy_coef": 0.05,
    "is_cap": 1.5,
    "expert_shaping": 0.1,
}


def test_the_linear_loss_is_op_four_with_that_function() -> None:
    hidden, weight, target, streams, token_weight = head_inputs()
    options = {"denom": 7.0, "token_weight": token_weight, "temperature": 0.8, "chunk_tokens": 9, "valid_vocab": 101}
    got = linear_policy_loss(hidden, weight, target, **streams, **EVERY_OPTION, **options)
    want = linear_token_loss(
        hidden,
        weight,
        target,
        lambda logprob, entropy, rows: policy_loss(logprob, entropy, **rows, **EVERY_OPTION),
        streams=streams,
        **options,
    )
    assert torch.equal(got[0], want[0]) and got[1] == want[1] and len(got[1]) == 8
    gradients = [torch.autograd.grad(loss, (hidden, weight)) for loss, _ in (got, want)]
    assert all(torch.equal(*pair) for pair in zip(*gradients, strict=True))


def test_the_linear_loss_against_float64_autograd_over_the_full_logits() -> None:
    hidden, weight, target, streams, token_weight = head_inputs()
    loss, metrics = linear_policy_loss(
        hidden, weight, target, **streams, **EVERY_OPTION, denom=7, token_weight=token_weight, chunk_tokens=9
    )
    leaves = double(hidden, weight)
    logprob, entropy = reference.linear_logprob_entropy(*leaves, target)
    wide = {name: stream if stream.dtype == torch.bool else stream.double() for name, stream in streams.items()}
    want, want_metrics = policy_loss(logprob, entropy, **wide, **EVERY_OPTION)
    weights = token_weight.double() * (target != -100)
    want = (weights * want).sum() / 7
    torch.testing.assert_close(loss.double(), want, rtol=VALUE_TOLERANCE, atol=10 * VALUE_TOLERANCE)
    for name, value in metrics.items():
        torch.testing.assert_close(
            value.double(), (weights * want_metrics[name]).sum(), rtol=10 * VALUE_TOLERANCE, atol=0
        )
        assert value > 0, f"{name}: no token has it"
    for got, expected in zip(
        torch.autograd.grad(loss, (hidden, weight)), torch.autograd.grad(want, leaves), strict=True
    ):
        # e^(logprob - old) carries an error of the log-prob, some 1e-6 here
        assert relative(got, expected) < 2 * GRADIENT_TOLERANCE


@pytest.mark.parametrize("advantage, token_weight", [(0.0, 1.0), (1.0, 0.0)])
def test_no_advantage_or_no_weight_is_no_gradient(advantage: float, token_weight: float) -> None:
    hidden, weight, target, streams, _ = head_inputs()
    weights = torch.full(target.shape, token_weight)
    loss, _ = linear_policy_loss(
        hidden,
        weight,
        target,
        advantage=torch.full(target.shape, advantage),
        old_logprob=streams["old_logprob"],
        denom=7,
        token_weight=weights,
    )
    gradients = torch.autograd.grad(loss, (hidden, weight))
    assert loss == 0 and not any(gradient.any() for gradient in gradients)


@pytest.mark.parametrize("main_grad", [False, True])
def test_micro_batches_add_up_to_the_batch(main_grad: bool) -> None:
    hidden, weight, target, streams, token_weight = head_inputs()

    def gradients(pieces) -> list[Tensor]:
        leaf, head = hidden.detach().requires_grad_(), weight.detach().requires_grad_()
        into = torch.zeros_like(weight) if main_grad else None
        total = 0.0
        for rows in pieces:
            of_rows = {name: stream[rows] for name, stream in streams.items()}
            loss, _ = linear_policy_loss(
                leaf[rows],
                head,
                target[rows],
                **of_rows,
                **EVERY_OPTION,
                denom=7,
                token_weight=token_weight[rows],
                grad_weight_out=into,
            )
            loss.backward()
            total = total + loss.detach()
        return [total, leaf.grad, into if main_grad else head.grad]

    whole, parts = gradients([slice(None)]), gradients([slice(10), slice(10, 11), slice(11, None)])
    torch.testing.assert_close(parts[0], whole[0], rtol=1e-5, atol=1e-6)
    for got, want in zip(parts[1:], whole[1:], strict=True):
        assert relative(got, want.double()) < GRADIENT_TOLERANCE


def test_linear_cross_entropy_is_that_of_torch() -> None:
    hidden, weight, target, _, token_weight = head_inputs()
    leaves = double(hidden, weight)
    _, entropy = reference.linear_logprob_entropy(*leaves, target, temperature=0.8)
    want = torch.nn.functional.cross_entropy(leaves[0] @ leaves[1].T / 0.8, target, reduction="none")
    want = (want * token_weight.double()).sum() / 7
    options = {"denom": 7, "token_weight": token_weight, "temperature": 0.8}
    got, metrics = linear_cross_entropy(hidden, weight, target, **options)
    assert metrics == {}
    torch.testing.assert_close(got.double(), want, rtol=VALUE_TOLERANCE, atol=0)
    for gradient, expected in zip(
        torch.autograd.grad(got, (hidden, weight)), torch.autograd.grad(want, leaves), strict=True
    ):
        assert relative(gradient, expected) < GRADIENT_TOLERANCE
    same, metrics = linear_cross_entropy(hidden, weight, target, want_entropy=True, **options)
    assert same.detach() == got.detach()
    torch.testing.assert_close(
        metrics["entropy"].double(), (entropy * token_weight).sum().detach(), rtol=VALUE_TOLERANCE, atol=0
    )


def run_shards(shards: tuple[int, ...]) -> dict:
    """Compute both linear losses for this rank's shard of the vocabulary."""
    import torch.distributed as dist

    rank = dist.get_rank()
    hidden, weight, target, streams, token_weight = head_inputs(vocab=sum(shards))
    start = sum(shards[:rank])
    leaves = hidden.detach().requires_grad_(), weight.detach()[start : start + shards[rank]].clone().requires_grad_()
    options = {
        "denom": 7,
        "token_weight": token_weight,
        "vocab_start": start,
        "group": dist.group.WORLD,
        "chunk_tokens": 9,
    }
    loss, metrics = linear_policy_loss(*leaves, target, **streams, **EVERY_OPTION, **options)
    plain, _ = linear_cross_entropy(*leaves, target, **options)
    gradients = torch.autograd.grad(loss, leaves) + torch.autograd.grad(plain, leaves)
    return {"losses": torch.stack([loss.detach(), plain.detach()]), "metrics": metrics, "gradients": gradients}


@pytest.mark.parametrize("shards", [(60, 41), (30, 11, 50, 10)])
def test_linear_losses_of_shards_are_those_of_one_process(ranks, shards) -> None:
    by_rank = ranks.run(run_shards, shards, world=len(shards))
    hidden, weight, target, streams, token_weight = head_inputs(vocab=sum(shards))
    options = {"denom": 7, "token_weight": token_weight}
    loss, metrics = linear_policy_loss(hidden, weight, target, **streams, **EVERY_OPTION, **options)
    plain, _ = linear_cross_entropy(hidden, weight, target, **options)
    for got in by_rank:
        assert torch.equal(got["losses"], by_rank[0]["losses"]) and got["metrics"] == by_rank[0]["metrics"]
    torch.testing.assert_close(by_rank[0]["losses"], torch.stack([loss, plain]).detach(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(by_rank[0]["metrics"], metrics, rtol=1e-5, atol=1e-5)
    for op, value in enumerate((loss, plain)):
        want = torch.autograd.grad(value, (hidden, weight))
        got = [by_rank[0]["gradients"][2 * op], torch.cat([of_rank["gradients"][2 * op + 1] for of_rank in by_rank])]
        for got_gradient, want_gradient in zip(got, want, strict=True):
            assert relative(got_gradient, want_gradient.double()) < 2 * GRADIENT_TOLERANCE  # both are rounded


def test_the_names_of_streams_are_keywords_of_the_function() -> None:
    loss = policy_module.PolicyLoss(**DEFAULTS)
    with pytest.raises(ValueError, match="unknown streams"):
        loss(torch.zeros(2), None, {"advantage": torch.zeros(2), "advantages": torch.zeros(2)})
    with pytest.raises(ValueError, match="advantage is missing"):
        loss(torch.zeros(2), None, {})
