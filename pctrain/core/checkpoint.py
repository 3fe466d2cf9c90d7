"""Save and load model, optimizer, schedule and RNG through megatron-core's dist_checkpointing.

A checkpoint that was saved at one layout loads at any other.
"""

from __future__ import annotations

import os
import pickle
import re
import struct
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.dist_checkpointing.dict_utils import dict_list_map_inplace
from megatron.core.dist_checkpointing.mapping import ShardedTensorFactory, apply_factories
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncCallsQueue
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer.optimizer import MegatronOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from torch.distributed.checkpoint import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata

from pctrain.common.errors import UserError
from pctrain.core import optimizer as optim
from pctrain.core.child_processes import children_die_with_this_process
from pctrain.core.megatron_version import HAS_COMMON_FILE, SAVE_IN_BACKGROUND
from pctrain.distributed.health import watchdog
from pctrain.run.checkpoints import note_digests


class Saver:
    """A writer of checkpoints, one at a time, in the background or not, by the same steps.

    In the background, a forked process per rank writes the values that the tensors had when `save` was called, while
    training continues. (Tensors on a GPU are copied to the host first.) All methods are collective.
    """

    def __init__(self, background: bool) -> None:
        self._background = background
        self._queue = AsyncCallsQueue()

    def save(
        self,
        directory: Path,
        chunks: list[DistributedDataParallel],
        optimizer: MegatronOptimizer,
        scheduler: OptimizerParamScheduler,
        done: Callable[[], None],
    ) -> None:
        """Write a checkpoint into `directory`, which must exist and hold no checkpoint.

        `done` is called on every rank when every rank has written its part.
        """
        self.poll(wait=True)
        state = _sharded_state(chunks, optimizer, is_loading=False)
        state["scheduler"] = scheduler.state_dict()
        state["rng"] = torch.get_rng_state()
        _write_in_place(state)
        request = dist_checkpointing.save(
            state, str(directory), validate_access_integrity=False, async_sharded_save=True, **SAVE_IN_BACKGROUND
        )
        write_and_hash = partial(_write_and_hash, request.async_fn, Path(directory), dist.get_rank())
        request = request._replace(async_fn=write_and_hash)
        request.add_finalize_fn(done)
        if self._background:
            with children_die_with_this_process():
                self._queue.schedule_async_request(request)
        else:
            request.execute_sync()

    def poll(self, *, wait: bool) -> None:
        """Call `done` of a save that every rank has written; with `wait`, wait until that is so.

        Without a save in progress it exchanges no message.
        """
        self._queue.maybe_finalize_async_calls(blocking=False)
        # The ranks agree on which saves are complete, so all of them leave this loop in the same round.
        while wait and self._queue.get_num_unfinalized_calls():
            watchdog.beat()  # a slow disk is no fault; the process that writes to it has no deadline
            time.sleep(0.02)
            self._queue.maybe_finalize_async_calls(blocking=False)


def _write_and_hash(write: Callable[..., None] | None, directory: Path, rank: int, *args: Any, **kwargs: Any) -> None:
    """Write this rank's part of a checkpoint, then its checksums while the bytes are still in the page cache."""
    if write is not None:  # None: this rank has nothing to write
        with children_die_with_this_process():
            write(*args, **kwargs)
    with suppress(OSError):  # the writer reports its own failures; a file without a checksum gets it at the commit
        note_digests(directory, sorted(directory.glob(f"__{rank}_*.distcp")), rank)


def save_weights(directory: Path, chunks: list[DistributedDataParallel]) -> None:
    """Write the weights alone into an empty `directory`, as the start of another run. Collective."""
    state = _sharded_state(chunks, None, is_loading=False)
    _write_in_place(state)
    with children_die_with_this_process():
        dist_checkpointing.save(state, str(directory), validate_access_integrity=False)


def load_weights(directory: Path, chunks: list[DistributedDataParallel]) -> None:
    """Load the weights alone, as the start of another run. Collective."""
    _load(directory, _sharded_state_to_read(directory, chunks, None), chunks)


def load(
    directory: Path,
    chunks: list[DistributedDataParallel],
    optimizer: MegatronOptimizer,
    scheduler: OptimizerParamScheduler,
) -> None:
    """Load weights, optimizer, schedule and RNG. Collective."""
    loaded = _load(directory, _sharded_state_to_read(directory, chunks, optimizer), chunks)
    optimizer.load_state_dict(loaded["optimizer"])
    optim.unshare_steps(optimizer)
    scheduler.load_state_dict(loaded["scheduler"])
    torch.set_rng_state(loaded["rng"])


def _sharded_state_to_read(
    directory: Path, chunks: list[DistributedDataParallel], optimizer: MegatronOptimizer | None
) -> dict[str, Any]:
    """Check that `directory` holds a checkpoint that is safe to read, and return the sharded state to read it into."""
    if not Path(directory).is_dir():
        raise UserError(f"{directory}: not found; expected a checkpoint folder such as RUN/checkpoints/step-100")
    try:
        is_checkpoint = dist_checkpointing.check_is_distributed_checkpoint(str(directory))
    except _UNREADABLE as error:
        raise _unreadable(Path(directory) / "metadata.json", error) from None
    if not is_checkpoint:
        raise UserError(
            f"{directory}: not a pctrain checkpoint (metadata.json is missing); name a folder RUN/checkpoints/step-N"
        )
    _refuse_foreign_objects(Path(directory) / ".metadata")
    common = Path(directory) / "common.pt"
    if HAS_COMMON_FILE or common.exists():
        _refuse_other_values(common)
    state = _sharded_state(chunks, optimizer, is_loading=True)
    _read_in_place(state)
    return state


def _load(directory: Path, state: dict[str, Any], chunks: list[DistributedDataParallel]) -> dict[str, Any]:
    """Read `state` from `directory`, put the weights into `chunks`, and return all that was read."""
    try:
        with _only_weights():
            loaded: dict[str, Any] = dist_checkpointing.load(state, str(directory))
    except pickle.UnpicklingError as error:
        raise _foreign(Path(directory), str(error)) from None
    except (CheckpointException, CheckpointingException, *_UNREADABLE) as error:
        raise _unreadable(Path(directory), error) from None
    for i, chunk in enumerate(chunks):
        chunk.module.load_state_dict(loaded[_key(i)])
    return loaded


def _key(i: int) -> str:
    """Return the key in this rank's state of its chunk `i` (a virtual pipeline stage); files do not show it."""
    return "model" if i == 0 else f"model{i}"


def _sharded_state(
    chunks: list[DistributedDataParallel], optimizer: MegatronOptimizer | None, is_loading: bool
) -> dict[str, Any]:
    # The fully reshardable format costs a gather over data parallel ranks and allows a resume at any TP x PP x DP.
    # Memory-efficient, it gathers through host memory on one rank of each data parallel group. Otherwise every rank
    # would hold the group's whole optimizer, and its GPU a third of that.
    # (A new dict each time: megatron-core leaves its process group in it.)
    metadata = {
        "distrib_optim_sharding_type": "fully_reshardable",
        "distrib_optim_fully_reshardable_mem_efficient": True,
    }
    # The inner module's state, not the data parallel wrapper's: its names would carry the wrapper's prefix.
    state = {_key(i): chunk.module.sharded_state_dict(metadata=metadata) for i, chunk in enumerate(chunks)}
    if optimizer is not None:
        optim.prime(optimizer)  # RL may save before its first update: dynamic sampling may have kept no prompt so far
        weights = dict(state)
        state["optimizer"] = optimizer.sharded_state_dict(weights, is_loading=is_loading, metadata=metadata)
    return state


# megatron-core stores the two halves of a SwiGLU's first matrix separately. It would hold a copy of all these matrices,
# half of a model and of its optimizer's state, at once. Both functions below avoid that copy.


def _write_in_place(state: dict[str, Any]) -> None:
    """Give each host tensor that is a view a separate storage over the same memory.

    megatron-core clones a view before it writes it, because torch.save would write the whole tensor behind it.
    """

    def own_storage(value: Any) -> Any:
        if isinstance(value, ShardedTensor) and value.data.is_cpu and value.data.is_contiguous():
            value.data = torch.from_dlpack(value.data.detach())
        return value

    apply_factories(state)  # makes the halves; `save` finds none left to make
    dict_list_map_inplace(own_storage, state)


def _read_in_place(state: dict[str, Any]) -> None:
    """Skip joining the halves into a new tensor where they were read into views of the whole."""

    def keep(whole: torch.Tensor, join: Callable[..., torch.Tensor], parts: list[torch.Tensor]) -> torch.Tensor:
        inside = all(part.untyped_storage().data_ptr() == whole.untyped_storage().data_ptr() for part in parts)
        return whole if inside else join(parts)

    def without_join(value: Any) -> Any:
        if isinstance(value, ShardedTensorFactory):
            value.merge_fn = partial(keep, value.data, value.merge_fn)
        return value

    dict_list_map_inplace(without_join, state)


# ---- what a checkpoint may hold -------------------------------------------------------------------------------------


_DCP = "torch.distributed.checkpoint."
_DTYPES = (value for value in vars(torch).values() if isinstance(value, torch.dtype))
_METADATA_CLASSES = {
    _DCP + "metadata": {
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorStorageMetadata",
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "TensorProperties",
        "_MEM_FORMAT_ENCODING",
    },
    _DCP + "planner": {"SavePlan", "WriteItem", "WriteItemType", "TensorWriteData", "BytesIOWriteData"},
    _DCP + "filesystem": {"_StorageInfo", "_StoragePrefix"},
    "torch": {"Size", *(str(value).removeprefix("torch.") for value in _DTYPES)},
    "torch.serialization": {"_get_layout"},
}


class _MetadataUnpickler(pickle.Unpickler):
    """An unpickler of the classes that torch.distributed.checkpoint and megatron-core write into `.metadata` only."""

    def find_class(self, module: str, name: str) -> Any:
        """Return the class if it is on the list, and raise UnpicklingError otherwise."""
        if name not in _METADATA_CLASSES.get(module, ()):
            raise pickle.UnpicklingError(f"{module}.{name}")
        return super().find_class(module, name)


def _refuse_foreign_objects(metadata: Path) -> None:
    """Read `.metadata` with a list of allowed classes; torch's own reading would run whatever the pickle names."""
    try:
        with open(metadata, "rb") as stream:
            content = _MetadataUnpickler(stream).load()
    except FileNotFoundError:
        raise UserError(f"{metadata} is missing: the checkpoint is incomplete; name another one") from None
    except pickle.UnpicklingError as error:
        raise _foreign(metadata, str(error)) from None
    except _UNREADABLE as error:
        raise _unreadable(metadata, error) from None
    if type(content) is not Metadata or not isinstance(vars(content).get("state_dict_metadata"), dict):
        raise _foreign(metadata, type(content).__name__)


def _refuse_other_values(common: Path) -> None:
    """Read `common.pt`, the part without tensors, and check that it is a dict of plain values.

    megatron-core reads it again later, where an error on one rank would leave the others waiting.
    """
    try:
        content = torch.load(common, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(f"{common} is missing: the checkpoint is incomplete; name another one") from None
    except pickle.UnpicklingError as error:
        refused = re.search(r"GLOBAL (\S+)", str(error))  # the class or function that torch refused, amid its advice
        raise _foreign(common, refused[1] if refused else _first_line(error)) from None
    except (RuntimeError, *_UNREADABLE) as error:
        raise _unreadable(common, error) from None
    if not isinstance(content, dict):
        raise _foreign(common, type(content).__name__)


# The errors of pickle, torch and megatron-core on bytes that none of them wrote. They share no base class.
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
        f"{path} cannot be read as a part of this model's checkpoint ({type(error).__name__}: {_first_line(error)}): "
        "it was altered, or it belongs to another model or version; copy it from its source again, "
        "or name another checkpoint"
    )


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [""])[0][:300]


def _foreign(path: Path, content: str) -> UserError:
    return UserError(
        f"{path} holds an object that pctrain never writes ({content}): it was altered, and is not loaded; "
        "copy it from its source again, or name another checkpoint"
    )


@contextmanager
def _only_weights() -> Iterator[None]:
    """Have torch.load read tensors and plain values only (weights_only), even where a library asks it for more."""
    name = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"
    before = os.environ.get(name)
    os.environ[name] = "1"
    try:
        yield
    finally:
        if before is None:
            os.environ.pop(name)
        else:
            os.environ[name] = before
