"""The loss of a policy update, per token: clipped ratio, KL to a reference, entropy bonus, and what corrects tokens of another sampler."""

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
    """loss [n] = -w min(r A, clip(r, 1 - clip_low, 1 + clip_high) A) + kl_coef KL - entropy_coef entropy, r = exp(logprob - old_logprob).

    logprob, entropy [n] of the policy that learns, differentiated, in nats (entropy None: not known); the streams, all [n], are
    constants. A sum over tokens is for the caller, or for `linear_policy_loss`. It is this function for the tokens of a linear head.

    advantage        A
    old_logprob      log-prob under the policy that the ratio is taken against (None: this one, so that r is 1 and its gradient counts)
    ref_logprob      log-prob under the reference of the KL; with kl_coef 0 the KL is a metric alone
    rollout_logprob  log-prob as the sampler computed it: w = min(exp(old_logprob - rollout_logprob), is_cap), else w = 1
    expert_mask      bool; such tokens were not sampled by the policy: -p / (p + expert_shaping) A, p = exp(logprob), replaces their first
                     term. Neither clipped nor weighted: their old_logprob and rollout_logprob are not read
    clip_low, clip_high  None: no bound on that side
    dual_clip        c > 1: where A < 0 the minimum is no less than c A (arXiv 1912.09729), so that r is bounded there too
    kl_kind          with d = ref_logprob - logprob: "k2" d^2 / 2, "k3" e^d - d - 1. k1 (-d) is a term of a reward: as a loss its gradient
                     is 0 on average

    Metrics [n], detached: `ratio` r; `clipped_low`, `clipped_high` and with dual_clip `clipped_dual` 1 where that bound holds; `kl` with
    ref_logprob; `is_weight` w with rollout_logprob; `entropy` if given; with expert_mask `expert` 1 on those tokens, where `ratio` and
    `is_weight` are 0, so that their means over the other tokens are quotients of sums.

    Raises ValueError for options out of range, or of which one needs another.
    """
    loss = PolicyLoss(
        clip_low=clip_low, clip_high=clip_high, dual_clip=dual_clip, kl_coef=kl_coef, kl_kind=kl_kind, entropy_coef=entropy_coef,
        is_cap=is_cap, expert_shaping=expert_shaping,
    )  # fmt: skip
    return loss(logprob, entropy, given_streams(advantage, old_logprob, ref_logprob, rollout_logprob, expert_mask))


def given_streams(*streams: Tensor | None) -> dict[str, Tensor]:
    """Tensors in the order of STREAMS -> {name: tensor} of those that are there."""
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
                "kl_kind 'k1' is no loss: subtract kl_coef * (logprob - ref_logprob), detached, from the advantage instead"
            )
        if self.kl_kind not in ("k2", "k3"):
            raise ValueError(f"kl_kind must be 'k2' or 'k3', got {self.kl_kind!r}")
        bounds = {"clip_low": 0, "clip_high": 0, "kl_coef": 0, "dual_clip": 1, "is_cap": 0, "expert_shaping": 0}
        for name, bound in bounds.items():
            value, inclusive = getattr(self, name), name in ("clip_low", "clip_high", "kl_coef")
            if value is not None and not (value >= bound if inclusive else value > bound):
                raise ValueError(f"{name} must be {'at least' if inclusive else 'above'} {bound}, got {value}")

    def _check(self, logprob: Tensor, entropy: Tensor | None, streams: Mapping[str, Tensor]) -> None:
        """Raises ValueError where the streams do not fit the options."""
        if unknown := set(streams) - set(STREAMS):
            raise ValueError(f"unknown streams {sorted(unknown)}: expected some of {', '.join(STREAMS)}")
        if "advantage" not in streams:
            raise ValueError("the stream advantage is missing")
        for name, stream, option in (
            ("is_cap", "rollout_logprob", self.is_cap),
            ("expert_shaping", "expert_mask", self.expert_shaping),
        ):
            if (option is None) != (stream not in streams):
                raise ValueError(
                    f"{stream} and {name} need each other: only {name if stream not in streams else stream} was given"
                )
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

    def __call__(
        self, logprob: Tensor, entropy: Tensor | None, streams: Mapping[str, Tensor]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        self._check(logprob, entropy, streams)
        advantage, expert = streams["advantage"], streams.get("expert_mask")
        current = logprob.detach()
        old = streams.get("old_logprob", current)
        if expert is not None:  # what stands there for an expert's token must not reach exp
            old = old.where(~expert, current)

        ratio = (logprob - old).exp()
        plain = ratio * advantage
        surrogate = plain
        metrics = {"ratio": ratio.detach()}
        if self.clip_low is not None or self.clip_high is not None:
            low = None if self.clip_low is None else 1 - self.clip_low
            high = None if self.clip_high is None else 1 + self.clip_high
            surrogate = torch.minimum(plain, ratio.clamp(low, high) * advantage)
        clipped = surrogate < plain
        metrics |= {"clipped_low": clipped & (advantage < 0), "clipped_high": clipped & (advantage > 0)}
        if self.dual_clip is not None:
            bounded = torch.maximum(surrogate, self.dual_clip * advantage).where(advantage < 0, surrogate)
            metrics["clipped_dual"] = bounded > surrogate
            surrogate = bounded
        if self.is_cap is not None:
            rollout = streams["rollout_logprob"]
            if expert is not None:
                rollout = rollout.where(~expert, current)
            metrics["is_weight"] = (old - rollout).exp().clamp(max=self.is_cap)
            surrogate = metrics["is_weight"] * surrogate
        if expert is not None:
            p = logprob.exp()
            surrogate = (p / (p + self.expert_shaping) * advantage).where(expert, surrogate)
            for name in {"ratio", "is_weight"} & set(metrics):
                metrics[name] = metrics[name].masked_fill(expert, 0)
            metrics["expert"] = expert

        loss = -surrogate
        if "ref_logprob" in streams:
            d = streams["ref_logprob"] - logprob
            kl = d.square() / 2 if self.kl_kind == "k2" else d.expm1() - d
            metrics["kl"] = kl
            if self.kl_coef:
                loss = loss + self.kl_coef * kl
        if entropy is not None:
            metrics["entropy"] = entropy
            if self.entropy_coef:
                loss = loss - self.entropy_coef * entropy
        return loss, {name: value.detach().to(logprob.dtype) for name, value in metrics.items()}
