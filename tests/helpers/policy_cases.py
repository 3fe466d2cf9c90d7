"""Tokens for the policy loss: strategies and tensors."""

import torch
from hypothesis import strategies as st
from torch import Tensor

logprobs = st.floats(-4, 0)


def columns(rows: list[tuple]) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Return logprob and entropy (leaves) and streams, in float64."""
    *values, expert = zip(*rows, strict=True)
    lp, entropy, advantage, old, ref, rollout = (torch.tensor(column, dtype=torch.float64) for column in values)
    streams = {"advantage": advantage, "old_logprob": old, "ref_logprob": ref, "rollout_logprob": rollout}
    return lp.requires_grad_(), entropy.requires_grad_(), streams | {"expert_mask": torch.tensor(expert)}
