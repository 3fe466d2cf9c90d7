"""The safetensors of a Hugging Face directory: read by slices, written tensor by tensor, so that no file is ever whole in memory.

The format (https://github.com/huggingface/safetensors): 8 bytes with the header's length, little endian; the header, JSON: name ->
dtype, shape, begin and end; the tensors' bytes. It is read by the safetensors library. Its `save_file` wants all tensors of a file at
once; `write` is given their shapes beforehand and then takes one at a time.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from pctrain.common.errors import UserError
from pctrain.files.durable import fsync

INDEX = "model.safetensors.index.json"
DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
# Pages of a mapped file count as this process's memory until it is closed: it is closed and opened anew after so many bytes of it.
_MAPPED_BYTES = 16 << 20
SHARD_BYTES = 5 * 10**9  # of one file
_FILE = re.compile(r"(?!\.+$)[^/\0\ud800-\udfff]{1,255}")  # a name in the same folder: an index does not lead elsewhere


class HFReader:
    """The tensors of a directory, one file or a sharded index. `reader[name]` is a handle that is read when it is indexed."""

    def __init__(self, directory: Path):
        self.directory = Path(directory)
        self._handles: dict = {}
        self._read = 0
        index = self.directory / INDEX
        if index.exists():
            self.files = _weight_map(index)
        elif (self.directory / "model.safetensors").exists():
            self.files = dict.fromkeys(self._open("model.safetensors").keys(), "model.safetensors")
        else:
            raise UserError(f"{self.directory}: no model.safetensors and no {INDEX}; expected a Hugging Face directory")

    def __enter__(self) -> HFReader:
        return self

    def __exit__(self, *_) -> None:
        self._handles.clear()

    def __getitem__(self, name: str) -> _Handle:
        return _Handle(self, name)

    def slice(self, name: str):
        """safetensors' own slice of a tensor: header only, until it is indexed."""
        file = self.files[name]
        if file not in self._handles:
            self._handles[file] = self._open(file)
        try:
            return self._handles[file].get_slice(name)
        except SafetensorError:
            raise UserError(f"{self.directory / file}: {name} is not in it, though {INDEX} says so") from None

    def read(self, name: str, index) -> torch.Tensor:
        """`index`: rows, or (rows, columns), as slices. Read in pieces of rows: memory is what is asked for, and two times a piece."""
        rows, *columns = index if isinstance(index, tuple) else (index,)
        shape, dtype = self.slice(name).get_shape(), self.dtype(name)
        first, end, _ = rows.indices(shape[0])
        row_bytes = prod(shape[1:]) * dtype.itemsize  # columns lie in the same pages as the rest of their row
        step = max(1, _MAPPED_BYTES // max(1, row_bytes))
        values = torch.empty(
            (end - first, *(len(range(n)[c]) for n, c in zip(shape[1:], columns or [slice(None)]))), dtype=dtype
        )
        for begin in range(first, end, step):
            piece = slice(begin, min(begin + step, end))
            values[piece.start - first : piece.stop - first] = self.slice(name)[(piece, *columns)]
            self._read += (piece.stop - piece.start) * row_bytes
            if self._read >= _MAPPED_BYTES:
                self._handles.clear()
                self._read = 0
        return values

    def dtype(self, name: str) -> torch.dtype:
        found = self.slice(name).get_dtype()
        if found not in DTYPES:
            raise UserError(
                f"{self.directory / self.files[name]}: {name} has dtype {found}; supported: {', '.join(DTYPES)}"
            )
        return DTYPES[found]

    def check(
        self, expected: Mapping[str, tuple[int, ...]], architecture: str, *, ignored: frozenset[str] = frozenset()
    ) -> None:
        """Raises UserError that lists what is missing and what is unknown, or names a tensor of another shape or dtype.

        `ignored`: names that may be there or not.
        """
        present = {name for name in self.files if name not in ignored and not name.endswith("rotary_emb.inv_freq")}
        missing, unknown = sorted(set(expected) - present), sorted(present - set(expected))
        if missing or unknown:
            raise UserError(
                f"{self.directory}: tensors do not fit {architecture}; missing: {_some(missing)}; unknown: {_some(unknown)}"
            )
        for name, shape in expected.items():
            self.dtype(name)
            found = tuple(self.slice(name).get_shape())
            if found != tuple(shape):
                file = self.directory / self.files[name]
                raise UserError(f"{file}: {name} has shape {list(found)}, config.json asks for {list(shape)}")

    def _open(self, file: str):
        path = self.directory / file
        try:
            return safe_open(path, framework="pt")
        except FileNotFoundError:
            raise UserError(f"{path}: not found, though {INDEX} names it; download it again") from None
        except (SafetensorError, OSError) as error:
            raise UserError(f"{path}: not a readable safetensors file: {error}; download it again") from None


@dataclass(frozen=True)
class _Handle:
    """A tensor on the disk; `handle[rows]` and `handle[:, columns]` read that part alone, as they would of a torch.Tensor."""

    reader: HFReader
    name: str

    def __getitem__(self, index) -> torch.Tensor:
        return self.reader.read(self.name, index)


@dataclass(frozen=True)
class Entry:
    """A tensor that is to be written."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize


def write(
    folder: Path, entries: list[Entry], tensors: Iterable[tuple[str, torch.Tensor]], *, shard_bytes: int = SHARD_BYTES
) -> None:
    """Writes `tensors`, in the order of `entries`, into one file, or several of at most `shard_bytes` (or one tensor) and their index.

    A tensor is cast to the dtype of its entry. Memory: one tensor.
    """
    shards: list[list[Entry]] = [[]]
    for entry in entries:
        if shards[-1] and sum(e.nbytes for e in shards[-1]) + entry.nbytes > shard_bytes:
            shards.append([])
        shards[-1].append(entry)
    n = len(shards)
    files = ["model.safetensors"] if n == 1 else [f"model-{i:05d}-of-{n:05d}.safetensors" for i in range(1, n + 1)]
    stream = iter(tensors)
    for file, shard in zip(files, shards, strict=True):
        _write_file(folder / file, shard, stream)
    if n > 1:
        weight_map = {entry.name: file for file, shard in zip(files, shards, strict=True) for entry in shard}
        index = {"metadata": {"total_size": sum(entry.nbytes for entry in entries)}, "weight_map": weight_map}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")
    for rest in stream:
        raise ValueError(f"{rest[0]} was not announced")


def _write_file(path: Path, shard: list[Entry], stream) -> None:
    header: dict = {
        "__metadata__": {"format": "pt"}
    }  # transformers wants to be told the framework that a file was made for
    offset = 0
    for entry in shard:
        header[entry.name] = {
            "dtype": _NAMES[entry.dtype],
            "shape": list(entry.shape),
            "data_offsets": [offset, offset + entry.nbytes],
        }
        offset += entry.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the tensors begin at a multiple of 8 bytes
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for entry in shard:
            name, tensor = next(stream)
            if (name, tuple(tensor.shape)) != (entry.name, tuple(entry.shape)):
                raise ValueError(f"expected {entry.name} {entry.shape}, got {name} {tuple(tensor.shape)}")
            values = tensor.detach().to("cpu", entry.dtype).contiguous()
            file.write(values.view(-1).view(torch.uint8).numpy().data)
            del tensor, values  # or it would live until the next one is whole
    fsync(path)


def _weight_map(index: Path) -> dict[str, str]:
    try:
        files = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        if not isinstance(files, dict) or not all(
            isinstance(file, str) and _FILE.fullmatch(file) for file in files.values()
        ):
            raise TypeError
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        raise UserError(
            f'{index}: expected JSON with "weight_map": {{tensor: file beside it}}; download it again'
        ) from None
    return files


def _some(names: list[str]) -> str:
    return "none" if not names else ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
