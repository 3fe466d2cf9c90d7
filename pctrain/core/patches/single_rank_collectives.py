"""Skips the reduce-scatter and the all-gather of data parallel groups of one rank.

megatron-core makes these calls even there, and each copies a buffer onto itself (on a small model 2% of a step). The
calls stay where they do more than that: where they overlap with computation, look for NaN, or scale (never with
`calculate_per_token_loss`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from megatron.core.distributed.param_and_grad_buffer import _ParamAndGradBucketGroup

from pctrain.core.patches.patch import Patch


def _has_no_effect(group: _ParamAndGradBucketGroup) -> bool:
    config = group.ddp_config
    does_more = (
        config.overlap_grad_reduce
        or config.overlap_param_gather
        or config.check_for_nan_in_grad
        or config.check_for_large_grads
    )
    return (
        not does_more
        and group.intra_distributed_optimizer_instance_size == 1
        and all(bucket.gradient_scaling_factor == 1.0 for bucket in group.buckets)
    )


def _skip_without_effect(collective: Callable[..., None]) -> Callable[..., None]:
    def call(self: _ParamAndGradBucketGroup, *args: Any, **kwargs: Any) -> None:
        if not _has_no_effect(self):
            collective(self, *args, **kwargs)

    return call


def _apply() -> None:
    _ParamAndGradBucketGroup.start_grad_sync = _skip_without_effect(_ParamAndGradBucketGroup.start_grad_sync)
    _ParamAndGradBucketGroup.start_param_sync = _skip_without_effect(_ParamAndGradBucketGroup.start_param_sync)


PATCH = Patch(
    package="megatron-core",
    version="0.16.1",
    reason="data parallel groups of one rank copy their buffers onto themselves in every step",
    test="tests/core/test_patches.py::test_one_rank_reduces_and_gathers_nothing",
    apply=_apply,
)
