"""Saves gradient buffers with several buckets at the right offsets.

For a checkpoint, megatron-core lays buckets end to end without the padding between them, then looks for each parameter
at its offset with the padding. Adam's moments and the float32 masters would be saved shifted, with a warning at most.
A tied embedding in a pipeline has a bucket for itself, and overlapped reductions make more. Here padding counts as
content.
"""

from __future__ import annotations

from typing import Any

from megatron.core.distributed.param_and_grad_buffer import _ParamAndGradBuffer

from pctrain.core.patches.patch import Patch


def _apply() -> None:
    original = _ParamAndGradBuffer.__init__

    def count_padding(self: _ParamAndGradBuffer, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        for bucket in self.buckets:
            bucket.numel_unpadded = bucket.grad_data.numel()
        self.numel_unpadded = self.numel

    _ParamAndGradBuffer.__init__ = count_padding


PATCH = Patch(
    package="megatron-core",
    version="0.16.1",
    reason="the optimizer state of a buffer with several buckets is saved with shifted offsets",
    test="tests/core/test_patches.py::test_padded_buckets_are_saved_at_their_offsets",
    apply=_apply,
)
