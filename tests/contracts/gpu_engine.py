"""Build vLLM's config from our engine options on a CUDA platform that is faked, and print it as JSON.

Run `python -m tests.contracts.gpu_engine HF_DIR DTYPE,WORLD,DEVICE_GIB...` in a separate process: vLLM's modules keep
the platform that they are imported on. Nothing is allocated and no engine starts.
"""

import json
import sys
import types
from pathlib import Path

from tests.helpers import environment  # noqa: F401  before torch

device = {"memory": 0}  # bytes


def fake_hopper() -> None:
    """Make vLLM take this machine for one with GPUs of compute capability 9.0, each with `device["memory"]`."""
    # The CUDA wheel's compiled operators. Its Python files are those of the CPU wheel.
    sys.modules["vllm._C_stable_libtorch"] = types.ModuleType("vllm._C_stable_libtorch")
    import vllm.platforms
    from vllm.platforms.cuda import NonNvmlCudaPlatform
    from vllm.platforms.interface import DeviceCapability

    class Hopper(NonNvmlCudaPlatform):
        @classmethod
        def get_device_capability(cls, device_id: int = 0) -> DeviceCapability:
            return DeviceCapability(9, 0)

        @classmethod
        def get_device_name(cls, device_id: int = 0) -> str:
            return "NVIDIA H200"

        @classmethod
        def get_device_total_memory(cls, device_id: int = 0) -> int:
            return device["memory"]

        @classmethod
        def import_kernels(cls) -> None:
            return None

        def is_cumem_allocator_available(self) -> bool:
            return True

    vllm.platforms._current_platform = Hopper()


def main(hf_dir: str, *cases: str) -> None:
    """Print, as a JSON list, what vLLM makes of our options in each case."""
    fake_hopper()
    import vllm.config.vllm
    from vllm.engine.arg_utils import EngineArgs
    from vllm.usage.usage_lib import UsageContext
    from vllm.v1.executor import Executor

    import pctrain.rollout.vllm_setup as vllm_setup
    from pctrain.config.tree import RolloutConfig
    from pctrain.rollout.sharing import EngineGroups

    vllm.config.vllm.HAS_TRITON = True  # it looks for a driver
    vllm_setup.on_gpu = lambda: True
    results = []
    for case in cases:
        dtype, world, device_gib = case.split(",")
        groups = EngineGroups(1)
        groups.world, device["memory"] = int(world), int(device_gib) << 30
        options = vllm_setup.engine_options(Path(hf_dir), RolloutConfig(), groups, dtype=dtype, context=256)
        config = EngineArgs(**options).create_engine_config(UsageContext.LLM_CLASS)
        results.append(
            {
                "dtype": str(config.model_config.dtype),
                "executor": Executor.get_class(config).__name__,
                "max_num_batched_tokens": config.scheduler_config.max_num_batched_tokens,
                "max_num_seqs": config.scheduler_config.max_num_seqs,
                "async_scheduling": config.scheduler_config.async_scheduling,
                "steps_in_flight": config.max_concurrent_batches,
                "model_runner_v2": config.use_v2_model_runner,
                "sleep_mode": config.model_config.enable_sleep_mode,
                "sleep_mode_backend": config.model_config.sleep_mode_backend,
                "cuda_graphs": config.compilation_config.cudagraph_mode.name,
                "prefix_caching": config.cache_config.enable_prefix_caching,
                "gpu_memory": config.cache_config.gpu_memory_utilization,
                "logprobs_mode": config.model_config.logprobs_mode,
            }
        )
    print(json.dumps(results))


if __name__ == "__main__":
    main(*sys.argv[1:])
