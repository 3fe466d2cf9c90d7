"""Keeps Adam's `step` when a checkpoint is loaded into torch's AdamW.

Without Transformer Engine and Apex, DistributedOptimizer drops `step` from the state it loads and looks for it later.
`optimizer.prime` and `optimizer.unshare_steps` work around two more faults of the same path.
"""

from __future__ import annotations

import torch
from megatron.core.optimizer import distrib_optimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

from pctrain.core.patches.patch import Patch


def _is_needed() -> bool:
    return not distrib_optimizer.HAVE_APEX_OR_TE


def _apply() -> None:
    original = DistributedOptimizer._set_main_param_and_optimizer_states

    def keep_step(
        self: DistributedOptimizer, model_param: torch.nn.Parameter, tensors: dict[str, torch.Tensor]
    ) -> None:
        group_index, order = self.model_param_group_index_map[model_param]
        state = self.optimizer.state[self.optimizer.param_groups[group_index]["params"][order]]
        step = {"step": state["step"].clone()} if "step" in state else {}
        original(self, model_param, {**step, **tensors})

    DistributedOptimizer._set_main_param_and_optimizer_states = keep_step


PATCH = Patch(
    package="megatron-core",
    version="0.16.1",
    reason="loading a checkpoint into torch's AdamW drops the optimizer's step and then looks for it",
    test="tests/core/test_checkpoint.py::test_same_layout_bit_for_bit",
    apply=_apply,
    is_needed=_is_needed,
)
