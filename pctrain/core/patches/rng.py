"""Keeps megatron-core's RNG tracker on the CPU generator where there is no CUDA; fork and restore work as on a GPU."""

from __future__ import annotations

import torch
from megatron.core.tensor_parallel import random as megatron_random

from pctrain.core.patches.patch import Patch, without_gpu


def _apply() -> None:
    torch.cuda.manual_seed = torch.manual_seed
    torch.cuda.get_rng_state = lambda device=None: torch.get_rng_state()
    torch.cuda.set_rng_state = lambda state, device=None: torch.set_rng_state(state)
    megatron_random._get_cuda_rng_state = lambda device=None, clone=False, graph_safe=False: torch.get_rng_state()
    megatron_random._set_cuda_rng_state = lambda state, device=-1, graph_safe=False: torch.set_rng_state(state)


PATCH = Patch(
    package="megatron-core",
    version="0.16.1",
    reason="its RNG tracker reads and writes the state of a CUDA generator",
    test="tests/core/test_layouts.py::test_losses_gradient_norms_and_weights_equal_those_of_one_process",
    apply=_apply,
    is_needed=without_gpu,
)
