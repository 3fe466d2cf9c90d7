"""Run PyTorch code on a fake `cuda:0`: CPU tensors are real, CUDA tensors are fake (shapes, dtypes, devices, storage).

Whatever a real GPU would make the host wait for is counted by (phase, kind, place), and the bytes of the fake tensors
that are alive are summed as CUDA's allocator would.
"""

from __future__ import annotations

import contextlib
import gc
import sys
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch._C._distributed_c10d import FakeWork
from torch._subclasses import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map_only, tree_unflatten

aten = torch.ops.aten
ROUND = 512  # bytes: torch's allocator for CUDA hands out multiples
HERE = str(Path(__file__).parent)
TORCH = str(Path(torch.__file__).parent)
ROOTS = ("pctrain", "pctrain_kernels", "megatron", "tests")  # places are named from here on
TIMERS = "pctrain/distributed/waits.py"  # wraps torch's collectives

# Operations whose result's shape depends on values: the GPU's host waits for them.
SHAPE_FROM_VALUES = {
    aten.nonzero.default,
    aten.masked_select.default,
    aten._unique2.default,
    aten.unique_dim.default,
    aten.unique_consecutive.default,
    aten.repeat_interleave.Tensor,
    aten.bincount.default,
}
INDEXED = {
    aten.index.Tensor,
    aten.index_put.default,
    aten.index_put_.default,
    aten._index_put_impl_.default,
    aten._unsafe_index.Tensor,
}
# The attribute of a fake tensor that was copied from a real single value and not written since, except by a collective:
# the other ranks are taken to have sent the same value.
KNOWN = "_known_value"


class Waits(Counter[tuple[str, str, str]]):
    """How often the host waits for the GPU, by (phase, kind, place); place is `file:function` outside of torch."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: dict[tuple[str, str, str], set[int]] = {}

    def add(self, phase: str, kind: str) -> None:
        """Count one wait at the innermost frame outside of torch and of this harness."""
        place, line = _place()
        key = (phase, kind, place)
        self[key] += 1
        self.lines.setdefault(key, set()).add(line)


def _place() -> tuple[str, int]:
    frame = sys._getframe(1)
    while frame is not None:
        name = frame.f_code.co_filename
        inside = name.startswith((TORCH, HERE, "<")) or name.endswith(TIMERS)
        if not inside or name.endswith("_program.py"):
            break
        frame = frame.f_back  # type: ignore[assignment]
    else:
        return "torch's autograd", 0
    parts = Path(name).parts
    first = max((at for at, part in enumerate(parts) if part in ROOTS), default=0)
    parts = parts[first:]
    return f"{'/'.join(parts)}:{frame.f_code.co_qualname}", frame.f_lineno


class Memory:
    """Bytes of living fake CUDA storages: now, and at the peak of each phase."""

    def __init__(self) -> None:
        self.now = 0
        self.peaks: dict[str, int] = {}
        self._held: dict[int, tuple[Any, int]] = {}

    def note(self, tensor: torch.Tensor, phase: str) -> None:
        """Count the tensor's storage if it is new, or has grown."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        size = -(-storage.nbytes() // ROUND) * ROUND
        known = self._held.get(key)
        if known is None:
            self._held[key] = (weakref.ref(storage, lambda _: self._free(key)), size)
        elif known[1] != size:
            self._held[key] = (known[0], size)
        self.now += size - (known[1] if known else 0)
        self.peaks[phase] = max(self.peaks.get(phase, 0), self.now)

    def _free(self, key: int) -> None:
        self.now -= self._held.pop(key)[1]


class FakeCuda(TorchDispatchMode):
    """Sends every operation with a CUDA tensor to FakeTensorMode, and runs the others for real.

    Attributes:
        waits: the host's waits so far.
        memory: the bytes of CUDA tensors.
        collectives: calls of torch.distributed on CUDA tensors, by (phase, name).
    """

    def __init__(self) -> None:
        super().__init__()
        self.fake = FakeTensorMode(allow_non_fake_inputs=False)
        self.waits, self.memory = Waits(), Memory()
        self.collectives: Counter[tuple[str, str]] = Counter()
        self.phase = "other"
        self.rank = 0
        # Called with every object that this rank sends; what rank i of a group sends where this rank sends `value`.
        self.on_send: Callable[[Any], None] = lambda value: None
        self.object_of_rank: Callable[[Any, int], Any] = lambda value, i: value
        self._pinned: dict[int, Any] = {}

    @contextlib.contextmanager
    def in_phase(self, name: str) -> Iterator[None]:
        """Count under the name of a phase."""
        before, self.phase = self.phase, name
        self.memory.peaks[name] = max(self.memory.peaks.get(name, 0), self.memory.now)
        try:
            yield
        finally:
            self.phase = before

    def forget(self) -> None:
        """Start all counts anew, except that of the memory in use."""
        gc.collect()
        self.waits.clear()
        self.collectives.clear()
        self.memory.peaks.clear()

    def wait(self, kind: str) -> None:
        """Count a wait of the host."""
        self.waits.add(self.phase, kind)

    def pin(self, tensor: torch.Tensor) -> torch.Tensor:
        """Mark a real tensor's memory as pinned."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        self._pinned[key] = weakref.ref(storage, lambda _: self._pinned.pop(key, None))
        return tensor

    def is_pinned(self, tensor: torch.Tensor) -> bool:
        """Return whether a real tensor's memory is pinned."""
        return not isinstance(tensor, FakeTensor) and tensor.untyped_storage()._cdata in self._pinned

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        inputs = [value for value in tree_flatten((args, kwargs))[0] if isinstance(value, torch.Tensor)]
        to_cuda = _is_cuda(kwargs.get("device"))
        pinned = bool(kwargs.pop("pin_memory", False))
        if not to_cuda and not any(isinstance(value, FakeTensor) for value in inputs):
            out = func(*args, **kwargs)
            return self.pin(out) if pinned else out
        if func.namespace == "c10d":
            return self._collective(func, args)
        if func is aten._local_scalar_dense.default:
            self.wait("item")
            return getattr(args[0], KNOWN, torch.ones((), dtype=args[0].dtype).item())
        copied = self._copy(func, args, kwargs)
        if copied is not None:
            return copied
        self._count_waits(func, args)
        out = self._run(func, args, kwargs)
        _note_value(func, args[0] if args else None, inputs, out)
        return self._keep(out, pinned)

    def _run(self, func: Any, args: Any, kwargs: Any) -> Any:
        values, structure = tree_flatten((args, kwargs))
        values = [
            self.fake.from_tensor(value)
            if isinstance(value, torch.Tensor) and not isinstance(value, FakeTensor)
            else value
            for value in values
        ]
        args, kwargs = tree_unflatten(values, structure)
        # Values are not known: a condition is taken to hold everywhere.
        if func is aten.nonzero.default:
            return args[0].new_empty(args[0].numel(), max(1, args[0].ndim), dtype=torch.int64)
        if func in INDEXED:
            args = (args[0], [index for mask in args[1] for index in _as_indices(mask)], *args[2:])
        # The key of FakeTensorMode's cache would keep the storage alive.
        self.fake.cache_enabled = func is not aten.set_.source_Storage_storage_offset
        with self.fake:
            return func(*args, **kwargs)

    def _keep(self, out: Any, pinned: bool) -> Any:
        """Count the results' memory; a result on the host becomes real."""

        def settle(tensor: torch.Tensor) -> torch.Tensor:
            if not isinstance(tensor, FakeTensor):
                return tensor
            if tensor.device.type == "cpu":
                real = torch.zeros(tensor.shape, dtype=tensor.dtype)
                return self.pin(real) if pinned else real
            self.memory.note(tensor, self.phase)
            return tensor

        return tree_map_only(torch.Tensor, settle, out)

    def _copy(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Count a copy between the devices, and make it if its result is on the host; None if it is not."""
        source = args[0]
        if func is aten._to_copy.default and "device" in kwargs:
            target = torch.device(kwargs["device"])
            non_blocking = kwargs.get("non_blocking", False)
        elif func is aten.copy_.default:
            target, source = source.device, args[1]
            non_blocking = args[2] if len(args) > 2 else kwargs.get("non_blocking", False)
        else:
            return None
        if _is_cuda(source.device) == _is_cuda(target):
            return None
        if _is_cuda(target):
            if not non_blocking:
                self.wait("copy to the device")
            elif not self.is_pinned(source):
                self.wait("copy to the device from pageable memory")
            return None
        if func is aten.copy_.default:
            if not (non_blocking and self.is_pinned(args[0])):
                self.wait("copy to the host")
            return args[0]
        copied = torch.zeros(source.shape, dtype=kwargs.get("dtype") or source.dtype)
        if non_blocking:  # torch makes its result in pinned memory
            return self.pin(copied)
        self.wait("copy to the host")
        return copied

    def _count_waits(self, func: Any, args: Any) -> None:
        if func in SHAPE_FROM_VALUES:
            self.wait(func.overloadpacket.__name__)
        if func not in INDEXED:
            return
        # One value that is written by a mask is filled in without a look at the mask.
        filled = func not in (aten.index.Tensor, aten._unsafe_index.Tensor) and args[2].numel() == 1
        for index in args[1]:
            if _is_mask(index) and not filled:
                self.wait("index by a mask")
            if index is not None and not _is_cuda(index.device):
                self.wait("index on the host")

    def _collective(self, func: Any, args: Any) -> Any:
        name = func.overloadpacket.__name__
        self.collectives[self.phase, name] += 1
        if name in ("barrier", "monitored_barrier_"):
            self.wait("barrier")
        for tensor in tree_flatten(args)[0]:
            if isinstance(tensor, torch.Tensor) and not _is_cuda(tensor.device):
                raise RuntimeError(f"{name} over NCCL got a tensor on {tensor.device}; it takes CUDA tensors only")
        returned = len(func._schema.returns)
        if returned == 0:
            return None
        work = FakeWork().boxed()
        # The tensors that an operation returns with its work are its first argument.
        return work if returned == 1 else (args[0], work)


def _note_value(func: Any, source: Any, inputs: list[torch.Tensor], out: Any) -> None:
    """Keep the value of a single number that is copied to the device; forget what an operation overwrites."""
    if func is aten._to_copy.default and source.numel() == 1 and not isinstance(source, FakeTensor):
        setattr(out, KNOWN, source.item())
    elif func._schema.is_mutable:
        for value in inputs:
            vars(value).pop(KNOWN, None)


def _is_mask(index: torch.Tensor | None) -> bool:
    return index is not None and index.dtype in (torch.bool, torch.uint8)


def _as_indices(index: torch.Tensor | None) -> list[torch.Tensor | None]:
    """Return what a mask selects, as if it held everywhere; anything else as it is."""
    if index is None or not _is_mask(index):
        return [index]
    return [index.new_empty(index.numel(), dtype=torch.int64) for _ in index.shape]


def _is_cuda(device: Any) -> bool:
    if device is None:
        return False
    return torch.device(device).type == "cuda"
