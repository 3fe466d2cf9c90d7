"""Every change that this project makes to an upstream package's code at run time, one file each.

Each file defines `PATCH`: the package and version it was written for, the reason, and the test that fails without it.
`install()` applies all of them, once per process, before a megatron-core model is built. To see what a patch is for,
take its name out of `NAMES` and run its test.

Two kinds of wrapping are not here: `rollout/vllm_setup.py` prepares vLLM, which starts without megatron-core, and
`distributed/waits.py` times torch's collectives without changing what they do.
"""

from __future__ import annotations

import importlib
import logging

from pctrain.core.patches.patch import Patch

# In this order: the patches after the first rely on device names that work.
NAMES = (
    "device_names",
    "rng",
    "adam_step",
    "expert_dispatch",
    "router_product",
    "uneven_splits",
    "grad_accumulation",
    "gradient_norm",
    "bucket_padding",
    "single_rank_collectives",
    "checkpoint_manager",
)

logger = logging.getLogger(__name__)
_installed = False


def load(name: str) -> Patch:
    """Return the patch in the file `name`.py."""
    patch: Patch = importlib.import_module(f"{__name__}.{name}").PATCH
    return patch


def install() -> None:
    """Apply every patch that this machine needs, and log each at debug level. Later calls do nothing."""
    global _installed
    if _installed:
        return
    _installed = True
    for name in NAMES:
        patch = load(name)
        if patch.is_needed():
            patch.apply()
            logger.debug("patched %s %s (%s): %s", patch.package, patch.version, name, patch.reason)
