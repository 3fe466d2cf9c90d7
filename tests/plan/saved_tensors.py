"""Count what autograd saves in a forward pass of the real model, for tests/plan/test_plan_activations.py.

    python saved_tensors.py CASES.json     [{"folder": model, "dtype": ..., "spec": ..., "device": "cpu" | "meta",
    "parallel": {...}, "tokens": n, "lengths": [n, ...], "fused": true | false}, ...]

Prints a line of JSON a case: the bytes of all storages that are saved, parameters excepted. Case by case in one
process, in torch's fake process group. On the meta device a GPU's kernels are counted: their substitutes here save what
torch's derivatives.yaml has for `_fused_rms_norm` and `_scaled_dot_product_flash_attention`, and torch's own
variable-length attention runs as it is.
"""

from __future__ import annotations

import json
import sys
from contextlib import ExitStack
from dataclasses import fields
from pathlib import Path
from unittest import mock

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.testing._internal.distributed.fake_pg import FakeStore

_type = torch.Tensor.type


class _FusedNorm(torch.autograd.Function):
    """The norm of CUDA: input, weight and the float32 scale of a row are saved."""

    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight, x.new_empty(*x.shape[:-1], 1, dtype=torch.float32))
        return torch.empty_like(x)


def _fused_norm(norm, x):
    return _FusedNorm.apply(x, norm.weight)


def _type_of_a_gpu(tensor, *args):
    """Return the name of a tensor's type, which `patches.device_names` makes a GPU's; it knows tensors of the CPU."""
    return _type(tensor if args else tensor.new_empty(0, device="cpu"), *args)


class _FlashAttention(torch.autograd.Function):
    """Attention of CUDA: inputs, output [batch, length, heads, dim] and the float32 log-sum-exp are saved."""

    @staticmethod
    def forward(ctx, q, k, v):
        batch, heads, length, dim = q.shape
        out = q.new_empty(batch, length, heads, dim).transpose(1, 2)
        ctx.save_for_backward(q, k, v, out, q.new_empty(batch, heads, length, dtype=torch.float32))
        return out


class _GpuFunctional:
    """torch.nn.functional of the torch spec's attention, with a GPU's kernel."""

    pad = staticmethod(F.pad)

    @staticmethod
    def scaled_dot_product_attention(q, k, v, is_causal, scale, enable_gqa):
        assert is_causal and enable_gqa == (q.shape[1] != k.shape[1])
        return _FlashAttention.apply(q, k, v)


def main() -> int:
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

    from pctrain.core import patches

    patches.install()
    for case in json.loads(Path(sys.argv[1]).read_text()):
        tensor = case["parallel"].get("tensor", 1)
        dist.init_process_group("fake", rank=0, world_size=tensor, store=FakeStore())
        parallel_state.initialize_model_parallel(tensor_model_parallel_size=tensor, create_gloo_process_groups=False)
        model_parallel_cuda_manual_seed(0, force_reset_rng=True)
        with _on(case["device"]):
            print(json.dumps(_saved(case)), flush=True)
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()
    return 0


def _on(device: str) -> ExitStack:
    """Make a device the one that the model is built on; on meta, with a GPU's kernels."""
    from pctrain.core import model
    from pctrain.core.layers import packed_attention, rms_norm

    stack = ExitStack()
    if device == "meta":
        stack.enter_context(mock.patch.object(torch.cuda, "current_device", return_value="meta"))
        stack.enter_context(mock.patch.object(model, "device", return_value=torch.device("meta")))
        stack.enter_context(mock.patch.object(torch.Tensor, "type", _type_of_a_gpu))
        stack.enter_context(mock.patch.object(rms_norm.RMSNorm, "forward", _fused_norm))
        stack.enter_context(mock.patch.object(packed_attention, "F", _GpuFunctional))
    return stack


def _saved(case: dict) -> int:
    """Return the bytes that a forward pass saves, the final norm's input included."""
    from megatron.core.fusions.fused_bias_swiglu import bias_swiglu_impl

    from pctrain.config.tree import ModelConfig, ParallelConfig
    from pctrain.core import model
    from pctrain.core.layers import spec as layers
    from pctrain.hf.config import HFConfig

    def config_of(*args):
        config = of_model(*args)
        config.bias_activation_fusion = case["fused"]
        return config

    class Fused(layers.SwiGLU):
        def forward(self, gate_up):  # what megatron-core's feed-forward calls in the te spec
            return bias_swiglu_impl(gate_up, None)

    of_model, par = model.transformer_config, ParallelConfig(**case["parallel"])
    config = ModelConfig(path=case["folder"], dtype=case["dtype"])
    with (
        torch.device(case["device"]),
        mock.patch.object(model, "transformer_config", config_of),
        mock.patch.object(layers, "choose_spec", return_value=case["spec"]),
        mock.patch.object(layers, "SwiGLU", Fused if case["fused"] else layers.SwiGLU),
    ):
        [chunk] = model.build(HFConfig.read(Path(case["folder"])), config, par, trainable=True)
    chunk.train()
    bounds = torch.tensor([0, *torch.tensor(case["lengths"]).cumsum(0)], dtype=torch.int32)
    layout = model.attention_layout(case["spec"], chunk.module.config, bounds, case["tokens"])
    for field in fields(layout):
        value = getattr(layout, field.name)
        if isinstance(value, torch.Tensor):
            setattr(layout, field.name, value.to(case["device"]))

    parameters = {
        buffer.param_data.untyped_storage()._cdata for buffer in chunk.buffers + chunk.expert_parallel_buffers
    }
    storages = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage._cdata not in parameters:
            storages[storage._cdata] = storage  # kept, so that no other storage gets its address
        return tensor

    chunk.module.head = lambda hidden, weight: hidden.sum()
    tokens = torch.zeros(1, case["tokens"], dtype=torch.int64, device=case["device"])
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        chunk(tokens, tokens, attention_mask=None, packed_seq_params=layout)
    return sum(storage.nbytes() for storage in storages.values())


if __name__ == "__main__":
    sys.exit(main())
