"""Lets the router of a mixture of experts run without Transformer Engine.

The router asks whether Transformer Engine has its matrix product, by a name that is unbound without it.
"""

from __future__ import annotations

from megatron.core.transformer.moe import moe_utils

from pctrain.core.patches.patch import Patch


def _is_needed() -> bool:
    return not hasattr(moe_utils, "te_general_gemm")


def _apply() -> None:
    moe_utils.te_general_gemm = None


PATCH = Patch(
    package="megatron-core",
    version="0.16.1",
    reason="without Transformer Engine, the router of a mixture of experts reads an unbound name",
    test="tests/core/test_patches.py::test_patches_without_transformer_engine_are_not_about_the_device",
    apply=_apply,
    is_needed=_is_needed,
)
