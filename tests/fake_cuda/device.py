"""Make this process believe in a GPU: load the shim, import torch, and give torch.cuda answers for one H200.

`start()` must be the first thing of a process, before anything imports torch.
"""

from __future__ import annotations

import contextlib
import ctypes
import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, ClassVar

from tests.fake_cuda.build import library

if TYPE_CHECKING:
    from tests.fake_cuda.mode import FakeCuda


def start(world: int) -> FakeCuda:
    """Return the mode, entered for the rest of the process.

    Process groups have `world` ranks, and this process is `mode.rank`.
    """
    assert "torch" not in sys.modules, "the shim must be loaded before torch"
    ctypes.CDLL(str(library()), mode=ctypes.RTLD_GLOBAL)
    import torch

    from tests.fake_cuda.mode import FakeCuda

    mode = FakeCuda()
    torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor(..., device="cuda") reaches the mode as a copy
    _use_fused_norm(torch)
    _stub_cuda(torch, mode)
    _stub_tensors(torch, mode)
    _stub_distributed(mode, world)
    mode.__enter__()
    _stub_triton()
    return mode


def _use_fused_norm(torch: Any) -> None:
    """Let RMSNorm be one operation, which saves its input and a scale of each row, as it is on CUDA.

    A CPU build has no such kernel, and composes the norm of operations whose float32 results are saved. A kernel that
    is registered makes torch use its own formula for the gradient; fake tensors never reach it.
    """

    def kernel(*arguments: Any) -> None:
        raise AssertionError("a fake tensor reached a kernel")

    torch.library.impl("aten::_fused_rms_norm", "CUDA")(kernel)


class Event:
    """torch.cuda.Event: everything before it is over."""

    def __init__(self, *_: Any, **__: Any) -> None: ...

    def record(self, stream: Stream | None = None) -> None:
        """Do nothing."""

    def wait(self, stream: Stream | None = None) -> None:
        """Do nothing: a stream waits, not the host."""

    def query(self) -> bool:
        """Return True."""
        return True

    def synchronize(self) -> None:
        """Count a wait."""
        Stream.mode.wait("synchronize")

    def elapsed_time(self, other: Event) -> float:
        """Return a time in milliseconds."""
        return 1.0


class Stream:
    """torch.cuda.Stream: the only one."""

    mode: ClassVar[FakeCuda]
    cuda_stream = 0

    def __init__(self, *_: Any, **__: Any) -> None: ...

    def wait_stream(self, stream: Stream) -> None:
        """Do nothing: a stream waits, not the host."""

    def wait_event(self, event: Event) -> None:
        """Do nothing: a stream waits, not the host."""

    def record_event(self, event: Event | None = None) -> Event:
        """Return the event."""
        return event or Event()

    def query(self) -> bool:
        """Return True."""
        return True

    def synchronize(self) -> None:
        """Count a wait."""
        Stream.mode.wait("synchronize")


def _stub_cuda(torch: Any, mode: FakeCuda) -> None:
    cuda = torch.cuda
    generator = torch.Generator()
    properties = SimpleNamespace(
        name="NVIDIA H200",
        major=9,
        minor=0,
        total_memory=int(139.7 * 2**30),
        multi_processor_count=132,
        shared_memory_per_multiprocessor=228 * 1024,
    )

    Stream.mode = mode
    stream = Stream()

    def set_state(state: Any, device: Any = None) -> None:
        generator.set_state(state)

    stubs: dict[str, Any] = {
        "_lazy_init": lambda: None,
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "set_device": lambda device: None,
        "_exchange_device": lambda device: 0,
        "_maybe_exchange_device": lambda device: 0,
        "synchronize": lambda device=None: mode.wait("synchronize"),
        "empty_cache": lambda: None,
        "ipc_collect": lambda: None,
        "Stream": Stream,
        "Event": Event,
        "current_stream": lambda device=None: stream,
        "default_stream": lambda device=None: stream,
        "set_stream": lambda stream: None,
        "stream": lambda stream: contextlib.nullcontext(),
        "get_device_properties": lambda device=None: properties,
        "get_device_capability": lambda device=None: (9, 0),
        "get_device_name": lambda device=None: properties.name,
        "mem_get_info": lambda device=None: (properties.total_memory, properties.total_memory),
        "is_bf16_supported": lambda including_emulation=True: True,
        "is_current_stream_capturing": lambda: False,
        "memory_allocated": lambda device=None: mode.memory.now,
        "default_generators": (generator,),
    }
    random = {
        "get_rng_state": lambda device=None: generator.get_state(),
        "set_rng_state": set_state,
        "manual_seed": generator.manual_seed,
        "manual_seed_all": generator.manual_seed,
        "initial_seed": generator.initial_seed,
    }
    for name, value in {**stubs, **random}.items():
        setattr(cuda, name, value)
    for name, value in random.items():
        setattr(cuda.random, name, value)
    torch._C._cuda_getDevice = lambda: 0
    torch._C._cuda_setDevice = lambda device: None


def _stub_tensors(torch: Any, mode: FakeCuda) -> None:
    from torch._subclasses import FakeTensor
    from torch.utils._pytree import tree_map_only

    def numpy(self: Any, *, force: bool = False) -> Any:
        if self.device.type == "cuda" and not force:
            raise TypeError("can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() first.")
        return self.detach().cpu().numpy()

    def apply(self: Any, function: Callable[[Any], Any], recurse: bool = True) -> Any:
        """Move parameters as `Module._apply`, which cannot put a fake tensor into a real parameter."""
        for module in self.modules() if recurse else [self]:
            for name, parameter in module._parameters.items():
                if parameter is not None:
                    moved = function(parameter.detach())
                    if isinstance(moved, FakeTensor) and not isinstance(parameter, FakeTensor):
                        replaced = torch.nn.Parameter(moved, parameter.requires_grad)
                        replaced.__dict__.update(parameter.__dict__)
                        module._parameters[name] = replaced
                    else:
                        parameter.data = moved
            for name, buffer in module._buffers.items():
                if buffer is not None:
                    module._buffers[name] = function(buffer)
        return self

    make = torch.tensor

    def tensor(data: Any, **options: Any) -> Any:
        """Read the fake tensors in a list one by one, as torch does below the dispatcher."""
        return make(tree_map_only(FakeTensor, lambda value: value.item(), data), **options)

    torch.tensor = tensor
    FakeTensor.tolist = lambda self: self.cpu().tolist()
    FakeTensor.numpy = numpy
    torch.Tensor.pin_memory = lambda self, device=None: mode.pin(self.clone())
    torch.Tensor.is_pinned = lambda self, device=None: mode.is_pinned(self)
    torch.nn.Module._apply = apply


def _stub_distributed(mode: FakeCuda, world: int) -> None:
    """Put the fake process group behind `nccl` (CUDA tensors only) and `gloo` (CPU tensors only)."""
    import torch.distributed as dist
    from torch.distributed import distributed_c10d as c10d
    from torch.testing._internal.distributed.fake_pg import FakeStore

    backends = {"nccl": "cuda:fake", None: "cuda:fake", "gloo": "cpu:fake"}
    init, new_group = c10d.init_process_group, c10d.new_group

    def init_process_group(backend: str | None = None, **options: Any) -> None:
        options.update(rank=mode.rank, world_size=world, store=FakeStore())
        init(backends[backend], **options)

    def fake_group(
        ranks: Any = None, timeout: Any = None, backend: str | None = None, *rest: Any, **options: Any
    ) -> Any:
        return new_group(ranks, timeout, backends[backend], *rest, **options)

    for module in (dist, c10d):
        module.init_process_group = init_process_group
        module.new_group = fake_group

    to_tensor = c10d._object_to_tensor
    sent: list[Any] = []  # the last object, and from how many ranks it was read since

    def object_to_tensor(value: Any, device: Any, group: Any) -> Any:
        mode.on_send(value)
        sent[:] = [value, 0]
        return to_tensor(value, device, group)

    def tensor_to_object(tensor: Any, size: Any, group: Any) -> Any:
        tensor.cpu().numpy().tobytes()[:size]  # waits as the original does
        sent[1] += 1
        return mode.object_of_rank(sent[0], sent[1] - 1)

    c10d._object_to_tensor = object_to_tensor
    c10d._tensor_to_object = tensor_to_object


def _stub_triton() -> None:
    """Replace the kernels by objects that check their grid and do nothing."""
    from pctrain_kernels import triton_softmax

    class Kernel:
        def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
            assert all(isinstance(size, int) for size in grid)
            return lambda *arguments, **options: None

    triton_softmax.statistics_kernel = Kernel()
    triton_softmax.gradient_kernel = Kernel()
