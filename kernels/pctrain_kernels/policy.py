"""The loss of a policy update, per token.

It has a clipped ratio, a KL to a reference, an entropy bonus, and corrections for tokens that another sampler drew.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

STREAMS = ("advantage", "old_logprob", "ref_logprob", "rollout_logprob", "expert_mask")


def policy_loss(
    logprob: Tensor,
    entropy: Tensor | None,
    *,
    advantage: Tensor,
    old_logprob: Tensor | None = None,
    ref_logprob: Tensor | None = None,
    rollout_logprob: Tensor | None = None,
    expert_mask: Tensor | None = None,
    clip_low: float | None = 0.2,
    clip_high: float | None = 0.28,
    dual_clip: float | None = None,
    kl_coef: float = 0.0,
    kl_kind: str = "k3",
    entropy_coef: float = 0.0,
    is_cap: float | None = None,
    expert_shaping: float | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the loss [n] of n tokens and its detached metrics.

    loss = -w min(r A, clip(r, 1 - clip_low, 1 + clip_high) A) + kl_coef KL - entropy_coef entropy, with
    r = exp(logprob - old_logprob). The streams, all [n], are constants. The caller sums over tokens;
    `linear_policy_loss` is this function for the tokens of a linear head.

    Args:
        logprob: [n], of the policy that learns, differentiated, in nats.
        entropy: [n], likewise; None if it is not known.
        advantage: A.
        old_logprob: log-prob under the policy that the ratio is taken against; None for this policy itself, so that r
            is 1 and only its gradient counts.
        ref_logprob: log-prob under the reference of the KL; with kl_coef 0 the KL is only a metric.
        rollout_logprob: log-prob as the sampler computed it: w = min(exp(old_logprob - rollout_logprob), is_cap).
            Without it w = 1.
        expert_mask: bool, marks tokens that the policy did not sample. Their first term is -p / (p + expert_shaping) A
            with p = exp(logprob). It is neither clipped nor weighted, and their old_logprob and rollout_logprob are not
            read.
        clip_low: None for no lower bound.
        clip_high: None for no upper bound.
        dual_clip: c > 1: where A < 0 the minimum is at least c A (arXiv 1912.09729), so that r is bounded there too.
        kl_kind: with d = ref_logprob - logprob, "k2" is d^2 / 2 and "k3" is e^d - d - 1. k1 (-d) is a term of a reward:
            as a loss its gradient is 0 on average.

    Metrics [n]: `ratio` r; `clipped_low`, `clipped_high` and, with dual_clip, `clipped_dual`, 1 where that bound is
    active; `kl` with ref_logprob; `is_weight` w with rollout_logprob; `entropy` if given; with expert_mask `expert`, 1
    on those tokens, where `ratio` and `is_weight` are 0, so that their means over the other tokens are quotients of
    sums. ValueError if an option is out of range, or needs another one that is missing.
    """
    loss = PolicyLoss(
        clip_low=clip_low,
        clip_high=clip_high,
        dual_clip=dual_clip,
        kl_coef=kl_coef,
        kl_kind=kl_kind,
        entropy_coef=entropy_coef,
        is_cap=is_cap,
        expert_shaping=expert_shaping,
    )
    return loss(logprob, entropy, given_streams(advantage, old_logprob, ref_logprob, rollout_logprob, expert_mask))


def given_streams(*streams: Tensor | None) -> dict[str, Tensor]:
    """Return {name: tensor} of the tensors that are given, which are in the order of STREAMS."""
    return {name: stream.detach() for name, stream in zip(STREAMS, streams, strict=True) if stream is not None}


@dataclass(frozen=True, kw_only=True)
class PolicyLoss:
    """`policy_loss` with its options bound: a `TokenLoss`."""

    clip_low: float | None
    clip_high: float | None
    dual_clip: float | None
    kl_coef: float
    kl_kind: str
    entropy_coef: float
    is_cap: float | None
    expert_shaping: float | None

    def __post_init__(self) -> None:
        if self.kl_kind == "k1":
            raise ValueError(
                "kl_kind 'k1' is no loss: subtract kl_coef * (logprob - ref_logprob), detached, from the advantage "
                "instead"
            )
        if self.kl_kind not in ("k2", "k3"):
            raise ValueError(f"kl_kind must be 'k2' or 'k3', got {self.kl_kind!r}")
        for name in ("clip_low", "clip_high", "kl_coef"):
            value = getattr(self, name)
            if value is not None and not value >= 0:
                raise ValueError(f"{name} must be at least 0, got {value}")
        for name, bound in (("dual_clip", 1), ("is_cap", 0), ("expert_shaping", 0)):
            value = getattr(self, name)
            if value is not None and not value > bound:
                raise ValueError(f"{name} must be above {bound}, got {value}")

    def __call__(
        self, logprob: Tensor, entropy: Tensor | None, streams: Mapping[str, Tensor]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return (loss, metrics) of n tokens, as `policy_loss` does."""
        self._check(logprob, entropy, streams)
        current = logprob.detach()
        expert = streams.get("expert_mask")
        old = streams.get("old_logprob", current)
        if expert is not None:  # an expert's token may have any value there, which must not reach exp
            old = old.where(~expert, current)

        surrogate, metrics = self._clipped((logprob - old).exp(), streams["advantage"])
        if self.is_cap is not None:
            rollout = streams["rollout_logprob"]
            if expert is not None:
                rollout = rollout.where(~expert, current)
            metrics["is_weight"] = (old - rollout).exp().clamp(max=self.is_cap)
            surrogate = metrics["is_weight"] * surrogate
        if expert is not None:
            p = logprob.exp()
            surrogate = (p / (p + self.expert_shaping) * streams["advantage"]).where(expert, surrogate)
            for name in {"ratio", "is_weight"} & set(metrics):
                metrics[name] = metrics[name].masked_fill(expert, 0)
            metrics["expert"] = expert

        loss = -surrogate
        if "ref_logprob" in streams:
            d = streams["ref_logprob"] - logprob
            metrics["kl"] = kl = d.square() / 2 if self.kl_kind == "k2" else d.expm1() - d
            if self.kl_coef:
                loss = loss + self.kl_coef * kl
        if entropy is not None:
            metrics["entropy"] = entropy
            if self.entropy_coef:
                loss = loss - self.entropy_coef * entropy
        return loss, {name: value.detach().to(logprob.dtype) for name, value in metrics.items()}

    def _clipped(self, ratio: Tensor, advantage: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Return min(r A, clip(r) A), bounded by the dual clip, and the metrics of ratio and bounds."""
        plain = ratio * advantage
        surrogate = plain
        if self.clip_low is not None or self.clip_high is not None:
            low = None if self.clip_low is None else 1 - self.clip_low
            high = None if self.clip_high is None else 1 + self.clip_high
            surrogate = torch.minimum(plain, ratio.clamp(low, high) * advantage)
        clipped = surrogate < plain
        metrics = {
            "ratio": ratio.detach(),
            "clipped_low": clipped & (advantage < 0),
            "clipped_high": clipped & (advantage > 0),
        }
        if self.dual_clip is not None:
            bounded = torch.maximum(surrogate, self.dual_clip * advantage).where(advantage < 0, surrogate)
            metrics["clipped_dual"] = bounded > surrogate
            surrogate = bounded
        return surrogate, metrics

    def _check(self, logprob: Tensor, entropy: Tensor | None, streams: Mapping[str, Tensor]) -> None:
        """Raise ValueError if the streams do not fit the options."""
        if unknown := set(streams) - set(STREAMS):
            raise ValueError(f"unknown streams {sorted(unknown)}: expected some of {', '.join(STREAMS)}")
        if "advantage" not in streams:
            raise ValueError("the stream advantage is missing")
        _check_pair("is_cap", self.is_cap, "rollout_logprob", streams)
        _check_pair("expert_shaping", self.expert_shaping, "expert_mask", streams)
        if self.kl_coef and "ref_logprob" not in streams:
            raise ValueError("kl_coef needs ref_logprob")
        if self.entropy_coef and entropy is None:
            raise ValueError("entropy_coef needs the entropy")
        if "expert_mask" in streams and streams["expert_mask"].dtype != torch.bool:
            raise ValueError(f"expert_mask must be bool, got {streams['expert_mask'].dtype}")
        for name, stream in streams.items():
            if stream.shape != logprob.shape:
                raise ValueError(
                    f"expected {name} of shape {list(logprob.shape)}, as logprob has, got {list(stream.shape)}"
                )


def _check_pair(option: str, value: float | None, stream: str, streams: Mapping[str, Tensor]) -> None:
    """Raise ValueError if only one of an option and the stream that it needs is given."""
    if (value is None) != (stream not in streams):
        given = option if stream not in streams else stream
        raise ValueError(f"{stream} and {option} need each other: only {given} was given")
