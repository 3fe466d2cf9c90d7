"""Tokenized trajectories on disk, read one at a time, so memory does not grow with the data.

`build` writes a folder of the cache, `<cache>/<key>/`:

    shard-00000.tokens  the tokens of the records of one chunk of a file, one after the other: uint16 or int32
    index.npz           lengths int32 [n], span_counts int32 [n], spans int32 [m, 2], shards int64 [s] (records of each)
    ids.jsonl           the id of each record, one JSON string per line
    dropped.jsonl       where, cause and message of every record that is not in the set
    manifest.json       the inputs and the counts; it is written last, so a folder without it is not finished

The shards are read with `pread`, not through a memory map. The pages of a map count as memory of the process until they
are released one by one, and reading beyond the end of a damaged file would kill the process instead of raising an
error.
"""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from itertools import islice
from pathlib import Path
from typing import IO, Any

import numpy as np

from pctrain.common.errors import UserError
from pctrain.data.rows import Row
from pctrain.files import json_file, npz

FORMAT = 1
MANIFEST = "manifest.json"
# Files that a store holds open. A set of 889K trajectories has hundreds of shards, and a process can often open 1024
# files.
OPEN_FILES = 64


def shard_file(folder: Path, number: int, suffix: str) -> Path:
    """Return the path of a shard's file; the suffix is tokens or json."""
    return folder / f"shard-{number:05d}.{suffix}"


def is_finished(folder: Path) -> bool:
    """Return whether a build of the folder was finished."""
    return (folder / MANIFEST).is_file()


class TokenStore:
    """The samples of a finished folder, in the order of the files and their records.

    Threads may read it concurrently. It holds about 32 bytes per record in memory.

    Attributes:
        lengths: int32 [n], number of tokens of each sample.
        loss_tokens: int32 [n], number of tokens of each sample that are trained on.
        tokens: number of tokens of all samples.
        counts: {cause: number of records}. `cut` counts records that were shortened to the limit; all other causes
            count records that were dropped.
        manifest: the content of manifest.json (files, columns, limit, template, versions).

    Raises:
        UserError: the folder does not exist, is not finished, is of another version, or is damaged.
    """

    def __init__(self, folder: Path):
        self.folder = Path(folder)
        self.manifest = _read_manifest(self.folder)
        self.counts: dict[str, int] = self.manifest["counts"]
        self.tokens: int = self.manifest["tokens"]
        self._dtype = np.dtype(self.manifest["dtype"])
        self.lengths, self._spans, span_counts, shards = _read_index(self.folder)
        self._first_span, self._first_record = _starts(span_counts), _starts(shards)
        self._first_token = _starts(self.lengths)
        trained = np.concatenate([[0], np.cumsum(self._spans[:, 1] - self._spans[:, 0], dtype=np.int64)])
        self.loss_tokens = np.diff(trained[self._first_span]).astype(np.int32)
        self._open: OrderedDict[int, IO[bytes]] = OrderedDict()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> Row:
        """Return a sample: tokens int64 [L], and weights float32 [L], which are 1 on the tokens that are trained on.

        Raises:
            UserError: the shard is damaged.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        shard = self._shard(index)
        size = int(self.lengths[index]) * self._dtype.itemsize
        begin = self._first_token[index] - self._first_token[self._first_record[shard]]
        with self._lock:  # another thread must not close the file meanwhile
            stream = self._stream(shard)
            data = os.pread(stream.fileno(), size, int(begin) * self._dtype.itemsize)
        if len(data) != size:
            raise _damaged(self.folder, f"{stream.name} is shorter than {MANIFEST} says")
        tokens = np.frombuffer(data, self._dtype)
        weights = np.zeros(len(tokens), np.float32)
        for start, end in self._spans[self._first_span[index] : self._first_span[index + 1]]:
            weights[start:end] = 1
        return Row(tokens.astype(np.int64), weights)

    def id(self, index: int) -> str:
        """Return the record's own id, or "<file name>:<line or row>". It reads a file, so it is for messages only."""
        try:
            with open(self.folder / "ids.jsonl", encoding="utf-8") as lines:
                return str(json_file.parse(next(islice(lines, index, None))))
        except (OSError, ValueError, StopIteration):
            raise _damaged(self.folder, f"{self.folder / 'ids.jsonl'} is damaged") from None

    def _shard(self, index: int) -> int:
        return int(np.searchsorted(self._first_record, index, side="right")) - 1

    def _stream(self, shard: int) -> IO[bytes]:
        if shard not in self._open:
            if len(self._open) == OPEN_FILES:
                self._open.popitem(last=False)[1].close()
            file = shard_file(self.folder, shard, "tokens")
            try:
                self._open[shard] = open(file, "rb", buffering=0)  # noqa: SIM115 - it stays open for later samples
            except OSError as error:
                raise _damaged(self.folder, f"{file} cannot be read: {error.strerror}") from None
        self._open.move_to_end(shard)
        return self._open[shard]


def _damaged(folder: Path, problem: str) -> UserError:
    return UserError(f"{problem}. Delete {folder}; the next start makes it again.")


def _read_manifest(folder: Path) -> dict[str, Any]:
    try:
        manifest = json_file.parse((folder / MANIFEST).read_bytes())
    except FileNotFoundError:
        raise _damaged(folder, f"{folder} has no finished set of tokens ({MANIFEST} is missing)") from None
    except (OSError, json_file.MalformedJSON):
        raise _damaged(folder, f"{folder / MANIFEST} is not valid JSON") from None
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        version = str(manifest.get("format"))[:40] if isinstance(manifest, dict) else None
        raise _damaged(folder, f"{folder} has tokens of format {version}; expected {FORMAT}")
    counts, tokens = manifest.get("counts"), manifest.get("tokens")
    has_counts = isinstance(counts, dict) and all(type(count) is int for count in (tokens, *counts.values()))
    if not has_counts or manifest.get("dtype") not in ("uint16", "int32"):
        raise _damaged(folder, f"{folder / MANIFEST} was changed: counts, tokens or dtype is not valid")
    return manifest


def _read_index(folder: Path) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Return lengths, spans, span_counts and shards.

    Raises:
        UserError: the arrays are inconsistent, so rows would be read from the wrong place.
    """
    file = folder / "index.npz"
    try:
        lengths, spans, span_counts, shards = npz.read(file, ("lengths", "spans", "span_counts", "shards"))
        npz.check("lengths", lengths, "i", (None,))
        npz.check("span_counts", span_counts, "i", (len(lengths),))
        npz.check("shards", shards, "i", (None,))
        if (
            min(lengths.min(initial=1), span_counts.min(initial=1)) < 1
            or shards.min(initial=0) < 0
            or shards.sum() != len(lengths)
        ):
            raise ValueError("its counts do not match its records")
        npz.check("spans", spans, "i", (int(span_counts.sum(dtype=np.int64)), 2))
        ends = np.repeat(lengths, span_counts)
        if (spans[:, 0] < 1).any() or (spans[:, 1] <= spans[:, 0]).any() or (spans[:, 1] > ends).any():
            raise ValueError("its spans are not within the records")
    except FileNotFoundError:
        raise _damaged(folder, f"{file} is missing") from None
    except ValueError as error:
        raise _damaged(folder, f"{file} is damaged ({error})") from None
    return lengths, spans, span_counts, shards


def _starts(counts: np.ndarray) -> np.ndarray:
    """Return int64 [n + 1]: the start of each item, and the end of the last one."""
    starts = np.zeros(len(counts) + 1, np.int64)
    np.cumsum(counts, out=starts[1:])
    return starts
