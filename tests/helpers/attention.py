"""Attention of one sequence by its definition, and pack layouts, as the reference for the layers' attention."""

import torch

from pctrain.core.layers.packed_attention import PackedLayout


def layout_of(lengths: list[int], tokens: int, dim: int = 8) -> tuple[PackedLayout, list[int]]:
    bounds = torch.tensor([0, *torch.tensor(lengths).cumsum(0)], dtype=torch.int32)
    layout = PackedLayout.build(bounds, tokens, channels=128)
    positions = torch.arange(max(lengths), dtype=torch.float64)
    layout.angles = torch.outer(positions, 0.3 ** torch.arange(dim // 2)).repeat(1, 2)[:, None, None, :]
    return layout, bounds.tolist()


def attend_alone(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, angles: torch.Tensor) -> torch.Tensor:
    """Compute attention of one sequence [length, heads, dim] by its definition, with a mask and no fused kernel."""
    from megatron.core.models.common.embeddings.rope_utils import _apply_rotary_pos_emb_bshd

    q, k = (_apply_rotary_pos_emb_bshd(x, angles[: len(x), 0]) for x in (q, k))
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    scores = torch.einsum("ihd,jhd->hij", q, k) / q.shape[-1] ** 0.5
    future = torch.ones(len(q), len(q), dtype=torch.bool).triu(1)
    return torch.einsum("hij,jhd->ihd", scores.masked_fill(future, -torch.inf).softmax(-1), v).flatten(1)
