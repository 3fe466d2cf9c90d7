"""The memory of a GPU under vLLM's own sleep mode, for an engine on the CPU.

Everything above the driver is vLLM's code: LLM, engine core, scheduler, executor, `CuMemAllocator`, and the GPU
worker's `sleep` and `wake_up`. The driver's two calls are replaced, and fail where CUDA's would.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import pytest
import torch

if TYPE_CHECKING:
    from vllm import LLM


class GpuMemory:
    """Maps and unmaps the memory that the engine allocated, next to a learner whose allocator keeps a cache.

    Attributes:
        calls: what was asked of the memory, in order: "empty cache", "map TAG", "unmap TAG".
        learner_cache: True while torch's allocator keeps memory that a mapping would need.
    """

    def __init__(self, llm: LLM, patch: pytest.MonkeyPatch):
        import vllm.device_allocator
        from vllm.device_allocator import AllocationData, cumem
        from vllm.device_allocator.sleep_mode_backend import CuMemBackend
        from vllm.v1.worker.gpu_worker import Worker

        worker = llm.llm_engine.model_executor.driver_worker.worker
        self._parameters = list(worker.get_model().parameters())
        self._allocator = cumem.CuMemAllocator()
        self._mapped = {1: "weights", 2: "kv_cache"}  # pointer -> tag
        self.calls: list[str] = []
        self.learner_cache = False
        for pointer, tag in self._mapped.items():
            self._allocator.pointer_to_data[pointer] = AllocationData((0, 1 << 20, pointer, 0), tag)
        worker._sleep_mode_backend = CuMemBackend()
        patch.setattr(vllm.device_allocator, "get_mem_allocator_instance", lambda: self._allocator)
        patch.setattr(cumem, "python_create_and_map", self._map)
        patch.setattr(cumem, "python_unmap_and_release", self._unmap)
        patch.setattr(torch.cuda, "empty_cache", self._empty_cache)
        patch.setattr(torch.cuda, "synchronize", lambda device=None: None)
        patch.setattr(torch.accelerator, "synchronize", lambda device=None: None)
        patch.setattr(torch.accelerator, "get_memory_info", lambda device_index=None: (1 << 30, 1 << 31))
        patch.setattr(type(worker), "sleep", Worker.sleep)
        patch.setattr(type(worker), "wake_up", Worker.wake_up)
        shutdown = worker.shutdown

        def shut_down_and_free() -> None:
            shutdown()
            self._free_all()

        patch.setattr(worker, "shutdown", shut_down_and_free)

    @property
    def mapped(self) -> set[str]:
        """The tags that hold memory."""
        return set(self._mapped.values())

    def _map(self, _device: int, _size: int, pointer: int, _handle: int) -> None:
        tag = self._allocator.pointer_to_data[pointer].tag
        if self.learner_cache:
            raise RuntimeError(f"CUDA Error: out of memory (mapping {tag})")
        self._mapped[pointer] = tag
        self.calls.append(f"map {tag}")

    def _unmap(self, _device: int, _size: int, pointer: int, _handle: int) -> None:
        if pointer not in self._mapped:
            raise RuntimeError("CUDA Error: invalid argument (unmapping what is not mapped)")
        tag = self._mapped.pop(pointer)
        self.calls.append(f"unmap {tag}")
        if tag == "weights":
            for parameter in self._parameters:
                parameter.data.fill_(math.nan)

    def _empty_cache(self) -> None:
        self.learner_cache = False
        self.calls.append("empty cache")

    def _free_all(self) -> None:
        """Free all memory as the C++ allocator does when its pool is destroyed."""
        for pointer in list(self._allocator.pointer_to_data):
            self._unmap(*self._allocator._python_free_callback(pointer))
