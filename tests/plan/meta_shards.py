"""Real megatron-core shards of any rank of any world, on the meta device and in torch's fake process group.

    python meta_shards.py CASES.json     [{"folder": model, "world": n, "rank": r, "dtype": ..., "parallel": {...}},
    ...]

Prints a line of JSON a case: elements of each module's parameters, of its buffers and the bytes of their gradients, and
what the optimizer holds. It is a separate program: it tells this process that a device named meta is its GPU.
"""

from __future__ import annotations

import functools
import json
import sys
from pathlib import Path


def main() -> int:
    import torch
    import torch.distributed as dist
    from megatron.core import parallel_state
    from torch.testing._internal.distributed.fake_pg import FakeStore

    from pctrain.core import model, optimizer, patches

    patches.install()
    torch.cuda.current_device = lambda: "meta"  # where megatron-core makes its buffers
    model.device = lambda: torch.device("meta")
    # megatron-core selects the parameters to optimize by the name of their type. `patches.device_names` makes it that
    # of a GPU.
    named = torch.Tensor.type
    torch.Tensor.type = lambda self, *args: named(
        self.new_empty(0, device="cpu") if self.is_meta and not args else self, *args
    )
    # Groups for checkpoints over gloo, which the fake world has not.
    optimizer.get_megatron_optimizer = functools.partial(
        optimizer.get_megatron_optimizer, use_gloo_process_groups=False
    )
    for case in json.loads(Path(sys.argv[1]).read_text()):
        dist.init_process_group("fake", rank=case["rank"], world_size=case["world"], store=FakeStore())
        print(json.dumps(_held(case)), flush=True)
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()
    return 0


def _held(case: dict) -> dict:
    import torch
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

    from pctrain.common.device import DTYPES
    from pctrain.config.tree import ModelConfig, OptimizerConfig, ParallelConfig
    from pctrain.core import model, optimizer
    from pctrain.hf.config import HFConfig

    par, config = ParallelConfig(**case["parallel"]), ModelConfig(path=case["folder"], dtype=case["dtype"])
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=par.tensor,
        pipeline_model_parallel_size=par.pipeline,
        context_parallel_size=par.context,
        virtual_pipeline_model_parallel_size=par.virtual_pipeline if par.virtual_pipeline > 1 else None,
        expert_model_parallel_size=par.expert,
        create_gloo_process_groups=False,
    )
    model_parallel_cuda_manual_seed(0, force_reset_rng=True)
    with torch.device("meta"):
        # Attention over context parallel ranks is Transformer Engine's; their parameters and buffers are those of the
        # groups made above.
        alone = par.model_copy(update={"context": 1})
        chunks = model.build(HFConfig.read(Path(case["folder"])), config, alone, trainable=True)
        adam = optimizer.build(OptimizerConfig(), chunks, DTYPES[config.dtype], 10)[0]
        optimizer.prime(adam)
    buffers = [buffer for chunk in chunks for buffer in chunk.buffers + chunk.expert_parallel_buffers]
    assert {str(tensor.device) for buffer in buffers for tensor in (buffer.grad_data, buffer.param_data)} == {"meta"}
    return {
        "stage": parallel_state.get_pipeline_model_parallel_rank(),
        "parameters": [sum(p.numel() for p in chunk.module.parameters()) for chunk in chunks],
        "dense": sum(b.numel for chunk in chunks for b in chunk.buffers),
        "expert": sum(b.numel for chunk in chunks for b in chunk.expert_parallel_buffers),
        "weight_bytes": sum(b.param_data.nbytes for b in buffers),
        "gradient_bytes": sum(b.grad_data.nbytes for b in buffers),
        "optimizer_bytes": _optimizer_bytes(adam),
        "weights_are_masters": config.dtype == "float32",
    }


def _optimizer_bytes(adam) -> int:
    """Return the bytes of this rank's moments, and of its float32 masters if parameters have another dtype."""
    return sum(_bytes_of(part) for part in adam.chained_optimizers if not part.is_stub_optimizer)


def _bytes_of(part) -> int:
    inner = part.optimizer
    parameters = [parameter for group in inner.param_groups for parameter in group["params"]]
    assert all(str(parameter.device) == "meta" for parameter in parameters)
    moments = [inner.state[parameter][name] for parameter in parameters for name in ("exp_avg", "exp_avg_sq")]
    masters = [shard for group in part.shard_fp32_from_float16_groups for shard in group]
    return sum(tensor.nbytes for tensor in (*moments, *masters))


if __name__ == "__main__":
    sys.exit(main())
