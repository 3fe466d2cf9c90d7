"""megatron-core on a machine without CUDA (gloo back-end).

megatron-core spells the device `torch.cuda.current_device()` or `"cuda"` literally. Where no CUDA exists, `install()` makes those
spellings mean the CPU; where CUDA exists it does nothing. It changes no arithmetic: device names, the RNG's source, and syncs that
have nothing to wait for. Call it before a megatron model is built.
"""

from __future__ import annotations

import functools

import torch

from pctrain.common.device import on_gpu

# Factories that megatron-core calls with device="cuda" or device=torch.cuda.current_device().
_FACTORIES = ("tensor", "empty", "zeros", "ones", "full", "arange", "empty_like", "zeros_like", "ones_like")
_installed = False


def install() -> bool:
    """Returns True if the CPU patches are in force, False on a CUDA machine."""
    global _installed
    if on_gpu():
        return False
    if not _installed:
        _patch_device_names()
        _patch_rng()
        _patch_optimizer_checkpoints()
        _patch_expert_dispatch()
        _patch_uneven_splits()
        _installed = True
    return True


def _patch_device_names() -> None:
    torch.cuda.current_device = lambda: "cpu"  # megatron-core only ever uses it as device=...
    torch.cuda.set_device = lambda device: None
    torch.cuda.synchronize = lambda device=None: None
    # `with torch.device(...)` recognises factories by identity in a cached set. Fill the cache before the factories are
    # wrapped, or transformers' meta-device loading silently leaves garbage in rotary buffers.
    from torch.utils._device import _device_constructors

    _device_constructors()
    for name in _FACTORIES:
        setattr(torch, name, _cuda_means_cpu(getattr(torch, name)))
    torch.Tensor.cuda = lambda self, *args, **kwargs: self
    real_type = torch.Tensor.type
    # megatron-core chooses buckets by comparing tensor.type() with "torch.cuda.FloatTensor".
    torch.Tensor.type = lambda self, dtype=None, *args, **kwargs: (
        _DeviceBlindTypeName(real_type(self)) if dtype is None else real_type(self, dtype, *args, **kwargs)
    )


def _cuda_means_cpu(factory):
    @functools.wraps(factory)
    def wrapper(*args, **kwargs):
        device = kwargs.get("device")
        if device is not None and not isinstance(device, int) and str(device).split(":")[0] == "cuda":
            kwargs["device"] = "cpu"
            kwargs.pop("pin_memory", None)
        return factory(*args, **kwargs)

    return wrapper


class _DeviceBlindTypeName(str):
    """A tensor type name that equals its CUDA spelling too."""

    __hash__ = str.__hash__

    def __eq__(self, other):
        return isinstance(other, str) and str.replace(self, ".cuda", "") == str.replace(other, ".cuda", "")

    def __ne__(self, other):
        return not self == other


def _patch_rng() -> None:
    """megatron-core's RNG tracker keeps its fork and restore semantics, on the CPU generator."""
    from megatron.core.tensor_parallel import random as tp_random

    torch.cuda.manual_seed = torch.manual_seed
    torch.cuda.get_rng_state = lambda device=None: torch.get_rng_state()
    torch.cuda.set_rng_state = lambda state, device=None: torch.set_rng_state(state)
    tp_random._get_cuda_rng_state = lambda device=None, clone=False, graph_safe=False: torch.get_rng_state()
    tp_random._set_cuda_rng_state = lambda state, device=-1, graph_safe=False: torch.set_rng_state(state)


def _patch_optimizer_checkpoints() -> None:
    """DistributedOptimizer with torch's AdamW (no Transformer Engine, no Apex): loading drops Adam's `step` and then looks for it.

    Keep it. (`optimizer.prime` and `optimizer.unshare_steps` mend the other two faults of that load path.)
    """
    from megatron.core.optimizer import distrib_optimizer

    if distrib_optimizer.HAVE_APEX_OR_TE:
        return
    original = distrib_optimizer.DistributedOptimizer._set_main_param_and_optimizer_states

    def keep_step(self, model_param, tensors):
        group_index, order = self.model_param_group_index_map[model_param]
        state = self.optimizer.state[self.optimizer.param_groups[group_index]["params"][order]]
        step = {"step": state["step"].clone()} if "step" in state else {}
        original(self, model_param, {**step, **tensors})

    distrib_optimizer.DistributedOptimizer._set_main_param_and_optimizer_states = keep_step


def _patch_expert_dispatch() -> None:
    """The dispatcher of a mixture of experts copies token counts to the host on a CUDA stream of its own; here they are there already."""
    from megatron.core.transformer.moe import moe_utils
    from megatron.core.transformer.moe.token_dispatcher import MoEAlltoAllTokenDispatcher as Dispatcher

    # The router asks whether Transformer Engine has this function, by a name that is never bound without Transformer Engine.
    if not hasattr(moe_utils, "te_general_gemm"):
        moe_utils.te_general_gemm = None

    def already_on_the_host(self, point, tokens_per_expert=None):
        if point == self.cuda_dtoh_point:
            for name in ("input_splits", "output_splits", "output_splits_tp"):
                if torch.is_tensor(getattr(self, name)):
                    setattr(self, name, getattr(self, name).numpy())
        return tokens_per_expert

    postprocess = Dispatcher.combine_postprocess

    def let_go(self, *args, **kwargs):
        """Its probabilities are read no more. Kept, their graph would keep the model, and the threads of its gloo groups, for ever."""
        self.probs = None
        return postprocess(self, *args, **kwargs)

    Dispatcher.combine_postprocess = let_go
    Dispatcher.cuda_dtoh_stream = "none"  # anything but None: no stream is made
    Dispatcher._maybe_dtoh_and_synchronize = already_on_the_host


def _patch_uneven_splits() -> None:
    """Experts over tensor parallel ranks gather and reduce-scatter unequal numbers of tokens; gloo has both for equal ones only.

    Its all-to-all takes unequal ones, so they are made of that. A sum goes over the ranks in their order.
    """
    from megatron.core.tensor_parallel import mappings

    gather_equal, scatter_equal = mappings._gather_along_first_dim, mappings._reduce_scatter_along_first_dim

    def gather(input_, group, output_split_sizes=None, use_global_buffer=False):
        if group.size() == 1 or output_split_sizes is None:
            return gather_equal(input_, group, output_split_sizes, use_global_buffer)
        output = input_.new_empty(sum(output_split_sizes), *input_.shape[1:])
        torch.distributed.all_to_all_single(
            output, torch.cat([input_] * group.size()), output_split_sizes, [len(input_)] * group.size(), group=group
        )
        return output

    def reduce_scatter(input_, group, input_split_sizes=None, use_global_buffer=False):
        if group.size() == 1 or input_split_sizes is None:
            return scatter_equal(input_, group, input_split_sizes, use_global_buffer)
        mine = input_split_sizes[group.rank()]
        parts = input_.new_empty(group.size() * mine, *input_.shape[1:])
        torch.distributed.all_to_all_single(
            parts, input_.contiguous(), [mine] * group.size(), input_split_sizes, group=group
        )
        return parts.view(group.size(), mine, *input_.shape[1:]).sum(0)

    mappings._gather_along_first_dim, mappings._reduce_scatter_along_first_dim = gather, reduce_scatter
