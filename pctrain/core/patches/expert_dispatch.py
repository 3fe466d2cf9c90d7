"""Lets the token dispatcher of a mixture of experts run without CUDA streams.

The dispatcher copies token counts to the host on a separate CUDA stream; on a CPU the counts are on the host already.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.transformer.moe.token_dispatcher import MoEAlltoAllTokenDispatcher

from pctrain.core.patches.patch import Patch, without_gpu


def _convert_counts(
    self: MoEAlltoAllTokenDispatcher, point: str, tokens_per_expert: torch.Tensor | None = None
) -> torch.Tensor | None:
    """Convert the split sizes to numpy, as the original does after its copy; nothing needs to be copied."""
    if point == self.cuda_dtoh_point:
        for name in ("input_splits", "output_splits", "output_splits_tp"):
            splits = getattr(self, name)
            if torch.is_tensor(splits):
                setattr(self, name, splits.numpy())
    return tokens_per_expert


def _apply() -> None:
    postprocess = MoEAlltoAllTokenDispatcher.combine_postprocess

    def combine_and_release(self: MoEAlltoAllTokenDispatcher, *args: Any, **kwargs: Any) -> torch.Tensor:
        # Nothing reads the probabilities again. Their autograd graph would keep the model, and the threads of its gloo
        # groups, alive forever.
        self.probs = None
        return postprocess(self, *args, **kwargs)

    MoEAlltoAllTokenDispatcher.combine_postprocess = combine_and_release
    MoEAlltoAllTokenDispatcher.cuda_dtoh_stream = "none"  # anything but None: then no stream is created
    MoEAlltoAllTokenDispatcher._maybe_dtoh_and_synchronize = _convert_counts


PATCH = Patch(
    package="megatron-core",
    version="0.16.1",
    reason="the token dispatcher of a mixture of experts creates a CUDA stream for its token counts",
    test="tests/core/test_experts.py::test_training_at_any_layout_is_the_same_run",
    apply=_apply,
    is_needed=without_gpu,
)
