"""The safetensors of a Hugging Face directory: read by slices and written tensor by tensor, to save memory.

The format (https://github.com/huggingface/safetensors) is 8 bytes with the header's length, little endian; then the
header, JSON of name -> dtype, shape, begin and end; then the tensors' bytes. The safetensors library reads it. Its
`save_file` wants all tensors of a file at once; `write` takes their shapes first and then one tensor at a time.

Torch is imported where tensors are made, so that headers can be read without it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from safetensors import SafetensorError, safe_open

from pctrain.common.errors import UserError
from pctrain.files import json_file
from pctrain.files.durable import fsync
from pctrain.hf.weight_names import is_constant

if TYPE_CHECKING:
    import torch

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
SAFETENSORS_DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}  # safetensors' name: torch's name
# Pages of a mapped file count as this process's memory until the file is closed: it is reopened after so many bytes.
_MAPPED_BYTES = 16 << 20
SHARD_BYTES = 5 * 10**9  # most bytes of one file
_FILE = re.compile(r"(?!\.+$)[^/\0\ud800-\udfff]{1,255}")  # a name in the same folder: an index must not lead elsewhere


class HFReader:
    """A reader of the tensors of a directory, in one file or in several with an index.

    `reader[name]` is a handle: indexing it reads that part of the tensor.
    """

    def __init__(self, directory: Path) -> None:
        """Read the names of all tensors. Raises UserError if the directory has no readable safetensors."""
        self.directory = Path(directory)
        self._handles: dict[str, Any] = {}
        self._read = 0
        index = self.directory / INDEX
        if index.exists():
            self.files = _weight_map(index)
        elif (self.directory / SINGLE).exists():
            self.files = dict.fromkeys(self._open(SINGLE).keys(), SINGLE)
        else:
            raise UserError(f"{self.directory}: no {SINGLE} and no {INDEX}; expected a Hugging Face directory")

    def __enter__(self) -> HFReader:
        return self

    def __exit__(self, *_: object) -> None:
        self._handles.clear()

    def __getitem__(self, name: str) -> _Handle:
        return _Handle(self, name)

    def lazy_slice(self, name: str) -> Any:
        """Return safetensors' own slice of a tensor. Only the header is read until it is indexed."""
        file = self.files[name]
        if file not in self._handles:
            self._handles[file] = self._open(file)
        try:
            return self._handles[file].get_slice(name)
        except SafetensorError:
            raise UserError(f"{self.directory / file}: {name} is not in it, though {INDEX} says so") from None

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a tensor, from its file's header."""
        return tuple(self.lazy_slice(name).get_shape())

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the shapes of all tensors that a model loads, from the headers alone."""
        return {name: self.shape(name) for name in self.files if not is_constant(name)}

    def read(self, name: str, index: slice | tuple[slice, ...]) -> torch.Tensor:
        """Read rows, or (rows, columns), of a tensor; both are slices.

        The tensor is read in chunks of rows. Peak memory: the result plus two chunks.
        """
        import torch

        rows, *columns = index if isinstance(index, tuple) else (index,)
        shape, dtype = self.shape(name), self.dtype(name)
        first, end, _ = rows.indices(shape[0])
        row_bytes = prod(shape[1:]) * dtype.itemsize  # all columns of a row share its pages
        step = max(1, _MAPPED_BYTES // max(1, row_bytes))
        column_slices = columns or [slice(None)]
        widths = [len(range(n)[c]) for n, c in zip(shape[1:], column_slices, strict=False)]
        values = torch.empty((end - first, *widths), dtype=dtype)
        for begin in range(first, end, step):
            chunk = slice(begin, min(begin + step, end))
            values[chunk.start - first : chunk.stop - first] = self.lazy_slice(name)[(chunk, *columns)]
            self._read += (chunk.stop - chunk.start) * row_bytes
            if self._read >= _MAPPED_BYTES:
                self._handles.clear()
                self._read = 0
        return values

    def dtype(self, name: str) -> torch.dtype:
        """Return the dtype of a tensor. Raises UserError for a dtype that is not supported."""
        import torch

        dtype = self.lazy_slice(name).get_dtype()
        if dtype not in SAFETENSORS_DTYPES:
            raise UserError(
                f"{self.directory / self.files[name]}: {name} has dtype {dtype}; supported: "
                f"{', '.join(SAFETENSORS_DTYPES)}"
            )
        return getattr(torch, SAFETENSORS_DTYPES[dtype])

    def check(
        self, expected: Mapping[str, tuple[int, ...]], architecture: str, *, ignored: frozenset[str] = frozenset()
    ) -> None:
        """Raise UserError unless the directory holds exactly the tensors `expected`, with these shapes.

        The message lists missing and unknown tensors, or names one with another shape or an unsupported dtype.
        `ignored`: names that may be present or absent.
        """
        present = {name for name in self.files if name not in ignored and not is_constant(name)}
        missing, unknown = sorted(set(expected) - present), sorted(present - set(expected))
        if missing or unknown:
            raise UserError(
                f"{self.directory}: tensors do not fit {architecture}; missing: {_some(missing)}; "
                f"unknown: {_some(unknown)}"
            )
        for name, shape in expected.items():
            self.dtype(name)
            actual = self.shape(name)
            if actual != tuple(shape):
                file = self.directory / self.files[name]
                raise UserError(f"{file}: {name} has shape {list(actual)}, config.json asks for {list(shape)}")

    def _open(self, file: str) -> Any:
        path = self.directory / file
        try:
            return safe_open(path, framework="pt")
        except FileNotFoundError:
            raise UserError(f"{path}: not found, though {INDEX} names it; download it again") from None
        except (SafetensorError, OSError) as error:
            raise UserError(f"{path}: not a readable safetensors file: {error}; download it again") from None


@dataclass(frozen=True)
class _Handle:
    """A tensor on the disk; `handle[rows]` and `handle[:, columns]` read that part alone, as with a torch.Tensor."""

    reader: HFReader
    name: str

    def __getitem__(self, index: slice | tuple[slice, ...]) -> torch.Tensor:
        return self.reader.read(self.name, index)


@dataclass(frozen=True)
class Entry:
    """The name, dtype and shape of a tensor to write."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor in its file."""
        return prod(self.shape) * self.dtype.itemsize


def write(
    folder: Path, entries: list[Entry], tensors: Iterable[tuple[str, torch.Tensor]], *, shard_bytes: int = SHARD_BYTES
) -> None:
    """Write `tensors`, in the order of `entries`, into one file, or into several with an index.

    A file has at most `shard_bytes`, or one tensor. A tensor is cast to the dtype of its entry. Peak memory: one
    tensor.
    """
    shards: list[list[Entry]] = [[]]
    for entry in entries:
        if shards[-1] and sum(e.nbytes for e in shards[-1]) + entry.nbytes > shard_bytes:
            shards.append([])
        shards[-1].append(entry)
    n = len(shards)
    files = [SINGLE] if n == 1 else [f"model-{i:05d}-of-{n:05d}.safetensors" for i in range(1, n + 1)]
    stream = iter(tensors)
    for file, shard in zip(files, shards, strict=True):
        _write_file(folder / file, shard, stream)
    if n > 1:
        weight_map = {entry.name: file for file, shard in zip(files, shards, strict=True) for entry in shard}
        index = {"metadata": {"total_size": sum(entry.nbytes for entry in entries)}, "weight_map": weight_map}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")
    for name, _ in stream:
        raise ValueError(f"{name} was not announced in `entries`")


def _write_file(path: Path, shard: list[Entry], stream: Iterator[tuple[str, torch.Tensor]]) -> None:
    with open(path, "wb") as file:
        file.write(_header(shard))
        for entry in shard:
            name, tensor = next(stream)
            if (name, tuple(tensor.shape)) != (entry.name, tuple(entry.shape)):
                raise ValueError(f"expected {entry.name} {entry.shape}, got {name} {tuple(tensor.shape)}")
            _write_tensor(file, tensor, entry.dtype)
            del tensor  # otherwise it would live until the next tensor is complete
    fsync(path)


def _write_tensor(file: BinaryIO, tensor: torch.Tensor, dtype: torch.dtype) -> None:
    import torch

    values = tensor.detach().to("cpu", dtype).contiguous()
    file.write(values.view(-1).view(torch.uint8).numpy().data)


def _header(shard: list[Entry]) -> bytes:
    """Return the header of a file with its length in front."""
    names = {torch_name: name for name, torch_name in SAFETENSORS_DTYPES.items()}
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}  # transformers refuses files that name no framework
    offset = 0
    for entry in shard:
        header[entry.name] = {
            "dtype": names[str(entry.dtype).removeprefix("torch.")],
            "shape": list(entry.shape),
            "data_offsets": [offset, offset + entry.nbytes],
        }
        offset += entry.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the tensors begin at a multiple of 8 bytes
    return len(text).to_bytes(8, "little") + text


def _weight_map(index: Path) -> dict[str, str]:
    """Return {tensor: file} of an index."""
    advice = 'Expected JSON with "weight_map": {tensor: file in the same folder}; download it again'
    files = json_file.read_object(index, advice).get("weight_map")
    if not isinstance(files, dict) or not all(isinstance(f, str) and _FILE.fullmatch(f) for f in files.values()):
        raise UserError(f'{index}: "weight_map" is missing or names a file elsewhere. {advice}')
    return files


def _some(names: list[str]) -> str:
    if not names:
        return "none"
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
