"""Model, optimizer, schedule and RNG through megatron-core's dist_checkpointing: saved at one layout, loadable at another."""

from __future__ import annotations

import ctypes
import os
import pickle
import re
import signal
import struct
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from multiprocessing import get_context
from multiprocessing.managers import SyncManager
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.dist_checkpointing.dict_utils import dict_list_map_inplace
from megatron.core.dist_checkpointing.mapping import ShardedTensorFactory, apply_factories
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncCallsQueue
from torch.distributed.checkpoint import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata

from pctrain.common.errors import UserError
from pctrain.core import optimizer as optim
from pctrain.distributed.health import watchdog
from pctrain.run.checkpoints import note_digests


class Saver:
    """Writes checkpoints, one at a time; in the background or not, by the same steps.

    In the background a forked process per rank writes what the tensors held when `save` was called (copied to the host before, where
    they are on a GPU), while training goes on. All methods are collective.
    """

    def __init__(self, background: bool) -> None:
        self._background = background
        self._queue = AsyncCallsQueue()

    def save(self, directory: Path, chunks: list, optimizer, scheduler, done: Callable[[], None]) -> None:
        """Writes into `directory`, which must exist and hold no checkpoint; `done` is called on every rank when every rank has written."""
        self.poll(wait=True)
        _serve_results()
        state = _sharded_state(chunks, optimizer, is_loading=False)
        state["scheduler"] = scheduler.state_dict()
        state["rng"] = torch.get_rng_state()
        _write_in_place(state)
        request = dist_checkpointing.save(
            state, str(directory), validate_access_integrity=False, async_sharded_save=True
        )
        request = request._replace(
            async_fn=partial(_write_and_hash, request.async_fn, Path(directory), dist.get_rank())
        )
        request.add_finalize_fn(done)
        if self._background:
            with _children_die_with_this_process():
                self._queue.schedule_async_request(request)
        else:
            request.execute_sync()

    def poll(self, *, wait: bool) -> None:
        """Calls `done` of the save whose writing has ended on all ranks; `wait`: waits for that. No save under way: nothing, no message."""
        self._queue.maybe_finalize_async_calls(blocking=False)
        while (
            wait and self._queue.get_num_unfinalized_calls()
        ):  # the ranks agree on what is done: all go round as often
            watchdog.beat()  # a slow disk is no fault; its writer process has no deadline
            time.sleep(0.02)
            self._queue.maybe_finalize_async_calls(blocking=False)


def _serve_results() -> None:
    """megatron-core's writers report through a manager process, which would outlive a killed run: give it one that dies too."""
    if filesystem_async._results_queue is None:
        manager = SyncManager(
            ctx=get_context("spawn")
        )  # forked, it would keep a copy of every page that training changes
        manager.start(initializer=_die_with, initargs=(os.getpid(),))
        filesystem_async._results_queue = manager.Queue()  # holds on to the manager


_libc = ctypes.CDLL(None)
_parent: int | None = None  # the process whose forks are writers of a checkpoint, while it forks them


def _die_with(parent: int) -> None:
    _libc.prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    if os.getppid() != parent:
        os._exit(1)


@contextmanager
def _children_die_with_this_process() -> Iterator[None]:
    """A writer whose run was killed waits for ever for somebody to take its result."""
    global _parent
    _parent = os.getpid()
    try:
        yield
    finally:
        _parent = None


os.register_at_fork(after_in_child=lambda: _parent is not None and _die_with(_parent))


def _write_and_hash(write: Callable | None, directory: Path, rank: int, *args, **kwargs) -> None:
    """What a writing process does: megatron-core's part, then the checksums while the bytes are still in the page cache."""
    if write is not None:  # None: nothing of the checkpoint is this rank's to write
        with _children_die_with_this_process():
            write(*args, **kwargs)
    with suppress(OSError):  # a failed write is told by the writer; what has no checksum gets it at the commit
        note_digests(directory, sorted(directory.glob(f"__{rank}_*.distcp")), rank)


def save_weights(directory: Path, chunks: list) -> None:
    """Collective. As `Saver.save`, of the weights alone: the start of another run."""
    state = _sharded_state(chunks, None, is_loading=False)
    _write_in_place(state)
    _serve_results()
    with _children_die_with_this_process():
        dist_checkpointing.save(state, str(directory), validate_access_integrity=False)


def load(directory: Path, chunks: list, optimizer=None, scheduler=None) -> None:
    """Collective. Without an optimizer: the weights alone (the start of another run)."""
    if not Path(directory).is_dir():
        raise UserError(f"{directory}: not found; expected a checkpoint folder such as RUN/checkpoints/step-100")
    try:
        is_one = dist_checkpointing.check_is_distributed_checkpoint(str(directory))
    except _UNREADABLE as error:
        raise _unreadable(Path(directory) / "metadata.json", error) from None
    if not is_one:
        raise UserError(
            f"{directory}: not a pctrain checkpoint (metadata.json is missing); name a folder RUN/checkpoints/step-N"
        )
    _refuse_foreign_objects(Path(directory) / ".metadata")
    _refuse_other_values(Path(directory) / "common.pt")
    state = _sharded_state(chunks, optimizer, is_loading=True)
    for i in range(len(chunks)):
        _read_in_place(state[_key(i)])
    try:
        with _only_weights():
            loaded = dist_checkpointing.load(state, str(directory))
    except pickle.UnpicklingError as error:
        raise _foreign(Path(directory), str(error)) from None
    except (CheckpointException, CheckpointingException, *_UNREADABLE) as error:
        raise _unreadable(Path(directory), error) from None
    for i, chunk in enumerate(chunks):
        chunk.module.load_state_dict(loaded[_key(i)])
    if optimizer is not None:
        optimizer.load_state_dict(loaded["optimizer"])
        optim.unshare_steps(optimizer)
        scheduler.load_state_dict(loaded["scheduler"])
        torch.set_rng_state(loaded["rng"])


def _key(i: int) -> str:
    """Where this rank's state has its chunk i (a virtual pipeline stage). In the checkpoint, tensors go by names of their own."""
    return "model" if i == 0 else f"model{i}"


def _sharded_state(chunks: list, optimizer, is_loading: bool) -> dict:
    # The fully reshardable format costs a gather over data parallel ranks and buys a resume at any TP x PP x DP.
    # (A new dict each time: megatron-core leaves its process group in it.)
    metadata = {"distrib_optim_sharding_type": "fully_reshardable"}
    # The inner module's state, not the data parallel wrapper's: its names would carry the wrapper's prefix.
    state = {_key(i): chunk.module.sharded_state_dict(metadata=metadata) for i, chunk in enumerate(chunks)}
    if optimizer is not None:
        optim.prime(optimizer)  # RL may save before its first update: dynamic sampling may have kept no prompt so far
        weights = dict(state)
        state["optimizer"] = optimizer.sharded_state_dict(weights, is_loading=is_loading, metadata=metadata)
    return state


# megatron-core stores the two halves of a SwiGLU's first matrix apart. Both functions below spare a copy of all these matrices, half of
# a model, that it would hold at once.


def _write_in_place(state: dict) -> None:
    """A tensor in host memory that is part of a larger one is cloned before writing, as torch.save would write all of the larger one:
    give it a storage of its own over the same memory."""

    def own_storage(value):
        if isinstance(value, ShardedTensor) and value.data.is_cpu and value.data.is_contiguous():
            value.data = torch.from_dlpack(value.data.detach())
        return value

    apply_factories(state)  # the halves; `save` finds none left
    dict_list_map_inplace(own_storage, state)


def _read_in_place(weights: dict) -> None:
    """The halves are read into views of the parameter, and need not be joined into a new tensor after that."""

    def keep(whole: torch.Tensor, join: Callable, parts: list[torch.Tensor]) -> torch.Tensor:
        inside = all(part.untyped_storage().data_ptr() == whole.untyped_storage().data_ptr() for part in parts)
        return whole if inside else join(parts)

    def without_join(value):
        if isinstance(value, ShardedTensorFactory):
            value.merge_fn = partial(keep, value.data, value.merge_fn)
        return value

    dict_list_map_inplace(without_join, weights)


# ---- what a checkpoint may hold -----------------------------------------------------------------------------------------


_DCP = "torch.distributed.checkpoint."
_METADATA_CLASSES = {
    _DCP + "metadata": {"Metadata", "MetadataIndex", "StorageMeta", "TensorStorageMetadata", "BytesStorageMetadata",
                        "ChunkStorageMetadata", "TensorProperties", "_MEM_FORMAT_ENCODING"},
    _DCP + "planner": {"SavePlan", "WriteItem", "WriteItemType", "TensorWriteData", "BytesIOWriteData"},
    _DCP + "filesystem": {"_StorageInfo", "_StoragePrefix"},
    "torch": {"Size", *(str(value).removeprefix("torch.") for value in vars(torch).values() if isinstance(value, torch.dtype))},
    "torch.serialization": {"_get_layout"},
}  # fmt: skip


class _MetadataUnpickler(pickle.Unpickler):
    """Knows what torch.distributed.checkpoint and megatron-core write into `.metadata`, and nothing else."""

    def find_class(self, module: str, name: str):
        if name not in _METADATA_CLASSES.get(module, ()):
            raise pickle.UnpicklingError(f"{module}.{name}")
        return super().find_class(module, name)


def _refuse_foreign_objects(metadata: Path) -> None:
    """torch reads `.metadata` by plain pickle, which runs whatever it names. Read it once with an allow-list before."""
    try:
        with open(metadata, "rb") as stream:
            found = _MetadataUnpickler(stream).load()
    except FileNotFoundError:
        raise UserError(f"{metadata} is missing: this is no whole checkpoint; name another one") from None
    except pickle.UnpicklingError as error:
        raise _foreign(metadata, str(error)) from None
    except _UNREADABLE as error:
        raise _unreadable(metadata, error) from None
    if type(found) is not Metadata or not isinstance(vars(found).get("state_dict_metadata"), dict):
        raise _foreign(metadata, type(found).__name__)


def _refuse_other_values(common: Path) -> None:
    """What is no tensor: a dict of plain values. megatron-core reads it again, where an error of one rank would leave others waiting."""
    try:
        found = torch.load(common, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(f"{common} is missing: this is no whole checkpoint; name another one") from None
    except pickle.UnpicklingError as error:
        named = re.search(
            r"GLOBAL (\S+)", str(error)
        )  # what torch says of a class or function that it refuses, among advice
        raise _foreign(common, named[1] if named else _first_line(error)) from None
    except (RuntimeError, *_UNREADABLE) as error:
        raise _unreadable(common, error) from None
    if not isinstance(found, dict):
        raise _foreign(common, type(found).__name__)


# How pickle, torch and megatron-core meet bytes that none of them wrote: there is no one error for it.
_UNREADABLE = (
    OSError,
    EOFError,
    ValueError,
    LookupError,
    AttributeError,
    TypeError,
    ImportError,
    ArithmeticError,
    AssertionError,
    MemoryError,
    RecursionError,
    NotImplementedError,
    struct.error,
)


def _unreadable(path: Path, error: BaseException) -> UserError:
    return UserError(
        f"{path} cannot be read as a part of this model's checkpoint ({type(error).__name__}: {_first_line(error)}): it was "
        "altered, or is of another model or version; take it from its source again, or name another checkpoint"
    )


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [""])[0][:300]


def _foreign(path: Path, what: str) -> UserError:
    return UserError(
        f"{path} holds an object that no checkpoint holds ({what}): it was altered, and is not loaded; "
        "take it from its source again, or name another checkpoint"
    )


@contextmanager
def _only_weights() -> Iterator[None]:
    """Inside, torch.load reads tensors and plain values alone (weights_only), also where a library asks it for more."""
    name = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"
    before = os.environ.get(name)
    os.environ[name] = "1"
    try:
        yield
    finally:
        os.environ.pop(name) if before is None else os.environ.update({name: before})
