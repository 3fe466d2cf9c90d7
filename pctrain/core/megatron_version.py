"""Bridges the differences between megatron-core 0.16.1, the pinned version, and 0.19.2 (Python 3.12 and later).

The patches in `pctrain/core/patches/` apply to both.
"""

from __future__ import annotations

import inspect
from typing import Any

from megatron.core import dist_checkpointing

TESTED = ("0.16.1", "0.19.2")
_IS_019 = "async_strategy" in inspect.signature(dist_checkpointing.save).parameters

# Arguments of a save in the background: 0.19 would leave the writing to a package that is not a requirement of pctrain.
SAVE_IN_BACKGROUND: dict[str, Any] = {"async_strategy": "mcore"} if _IS_019 else {}

# 0.16.1 writes the part of a checkpoint without tensors to common.pt, 0.19 into the shards. Both read common.pt.
HAS_COMMON_FILE = not _IS_019

# The name of the function of `filesystem_async` that starts the manager of the checkpoint writers.
RESULTS_QUEUE = "get_write_results_queue" if _IS_019 else "_get_write_results_queue"


def mlp_submodules(mlp: Any) -> Any:
    """Return the submodules of a layer's MLP or mixture of experts: a ModuleSpec in 0.16.1, a partial in 0.19."""
    return mlp.keywords["submodules"] if _IS_019 else mlp.submodules
