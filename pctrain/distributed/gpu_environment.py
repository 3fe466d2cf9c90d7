"""The environment variables of a GPU process, which CUDA, Transformer Engine and vLLM read once.

They are set before any of the three is used. A value of the user's stays. On a CPU nothing reads them.
"""

from __future__ import annotations

import os

from pctrain.common.device import on_gpu
from pctrain.common.errors import UserError

ALLOCATOR = ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF")  # old and new name, in torch's order
DEFAULTS = {
    # Packs differ in size. Segments that grow leave no gaps. vLLM suspends them where its sleeping engine allocates;
    # before 0.32 it looked for the old name only.
    "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True",
    # megatron-core's own linear layers start a collective before the product that hides it, and rely on this order.
    "CUDA_DEVICE_MAX_CONNECTIONS": "1",
}
# Accepted values of each switch; the first one is set.
DETERMINISTIC = {
    "NVTE_ALLOW_NONDETERMINISTIC_ALGO": ("0",),  # backward of Transformer Engine's attention
    "CUBLAS_WORKSPACE_CONFIG": (":4096:8", ":16:8"),  # torch refuses products in deterministic mode without one of them
    # Switches add in no fixed order. The last value is what vLLM sets for its batch-invariant engine.
    "NCCL_ALGO": ("^NVLS", "Ring", "Tree", "ring,tree;allreduce:tree"),
    "VLLM_BATCH_INVARIANT": ("1",),  # products and attention of vLLM that do not depend on the batch
}


def prepare(*, deterministic: bool = False) -> None:
    """Set the variables. Call it before anything asks for a GPU or imports vLLM. Idempotent.

    Args:
        deterministic: `model.deterministic`. A CPU ignores it: it needs none of the switches, and vLLM's CPU engine
            does not start with the one of vLLM.

    Raises:
        UserError: the environment contradicts `deterministic`.
    """
    for name, value in DEFAULTS.items():
        if name not in ALLOCATOR or not any(os.environ.get(alias) for alias in ALLOCATOR):
            os.environ[name] = os.environ.get(name) or value
    if not (deterministic and on_gpu()):
        return
    for name, accepted in DETERMINISTIC.items():
        value = os.environ[name] = os.environ.get(name) or accepted[0]
        if value not in accepted:
            raise UserError(
                f"model.deterministic = true, but the environment has {name}={value}; expected "
                f"{' or '.join(accepted)}. Unset {name}, or leave model.deterministic out"
            )


def expandable_segments() -> bool:
    """Return whether this process asks torch's allocator for segments that grow."""
    asked = next((value for name in ALLOCATOR if (value := os.environ.get(name))), "")
    return "expandable_segments:true" in asked.lower().replace(" ", "")
