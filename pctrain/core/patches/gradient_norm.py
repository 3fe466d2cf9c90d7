"""Computes the norm of all gradients without reading one number per parameter from the device.

Without Transformer Engine and Apex, megatron-core reads the norm of every gradient on the host, so a GPU's queue runs
empty once per parameter. torch stacks the norms on the device, and a CPU gets the same bits either way.
"""

from __future__ import annotations

import torch
from megatron.core import utils
from megatron.core.optimizer import clip_grads

from pctrain.core.patches.patch import Patch


def l2_norm(
    chunk_size: int, noop_flag: torch.Tensor, tensor_lists: list[list[torch.Tensor]], per_tensor: bool, *args: object
) -> tuple[torch.Tensor, None]:
    """Return (the norm of all tensors, float32 [1], None), with the parameters of the function that it replaces."""
    norm = torch.nn.utils.get_total_norm(tensor for tensors in tensor_lists for tensor in tensors)
    return norm.float().view(1), None


def _is_needed() -> bool:
    return clip_grads.l2_norm_impl is utils.local_multi_tensor_l2_norm


def _apply() -> None:
    clip_grads.l2_norm_impl = l2_norm


PATCH = Patch(
    package="megatron-core",
    version="0.16.1",
    reason="without Transformer Engine or Apex, the gradient norm is read from the device once per parameter",
    test="tests/core/test_gradient_norm.py::test_the_norm_is_read_once",
    apply=_apply,
    is_needed=_is_needed,
)
