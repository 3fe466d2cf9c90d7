"""Tokenised trajectories on the disk, read one at a time: memory does not grow with the data.

A folder of the cache, `<cache>/<key>/`, which `build` writes:

    shard-00000.tokens  tokens of the records of one part of a file, one after the other: uint16 or int32
    index.npz           lengths int32 [n], span_counts int32 [n], spans int32 [m, 2], shards int64 [s] (records of each)
    ids.jsonl           the records' ids, a JSON string a line
    dropped.jsonl       where, cause, message of every record that is not in the set
    manifest.json       what it was made of, and the counts; written last: a folder without it is not finished

The shards are read by `pread`, not through a mapping: the pages of a mapping count as memory of the process that
touched them, until they are given back one by one, and reading beyond the end of a damaged file would end the process
by a signal in place of an error.
"""

from __future__ import annotations

import json
import os
import threading
from collections import OrderedDict
from itertools import islice
from pathlib import Path
from typing import IO

import numpy as np

from pctrain.common.errors import UserError
from pctrain.data.rows import Row
from pctrain.files import npz

FORMAT = 1
MANIFEST = "manifest.json"
OPEN_FILES = (
    64  # of a store at a time: a set of 889K trajectories has hundreds of shards, and a process commonly 1024 files
)


def shard_file(folder: Path, number: int, suffix: str) -> Path:
    return folder / f"shard-{number:05d}.{suffix}"


def is_finished(folder: Path) -> bool:
    return (folder / MANIFEST).is_file()


class TokenStore:
    """The samples of a finished folder, in the order of the files and their records; threads may read it at the same time.

    About 32 bytes a record are held in memory.

    Attributes:
        lengths: int32 [n], tokens of each sample.
        loss_tokens: int32 [n], tokens of each sample that are trained on.
        tokens: their sum over all samples.
        counts: {cause: records}: `cut` of those in the set that were shortened to the limit; by any other cause, those
            that are not in it.
        manifest: all that the folder's manifest.json says (files, columns, limit, template, versions).
    """

    def __init__(self, folder: Path):
        """Raises UserError for a folder that is not there, not finished, or of another version."""
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
        """Tokens int64 [L]; weights float32 [L], 1 on the tokens that are trained on.

        UserError where the shard is damaged.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        shard = self._shard(index)
        tokens = np.empty(self.lengths[index], self._dtype)
        begin = self._first_token[index] - self._first_token[self._first_record[shard]]
        with self._lock:  # another thread must not close the file meanwhile
            stream = self._stream(shard)
            read = os.preadv(stream.fileno(), [tokens], int(begin) * self._dtype.itemsize)
        if read != tokens.nbytes:
            raise UserError(
                f"{stream.name} is shorter than {MANIFEST} says; delete {self.folder}, and it is made again"
            )
        weights = np.zeros(len(tokens), np.float32)
        for start, end in self._spans[self._first_span[index] : self._first_span[index + 1]]:
            weights[start:end] = 1
        return Row(tokens.astype(np.int64), weights)

    def id(self, index: int) -> str:
        """The record's id: "<file name>:<line or row>", or its own. For messages: it reads a file."""
        try:
            with open(self.folder / "ids.jsonl", encoding="utf-8") as lines:
                return str(json.loads(next(islice(lines, index, None))))
        except (OSError, ValueError, RecursionError, StopIteration):
            raise UserError(
                f"{self.folder / 'ids.jsonl'} is damaged; delete {self.folder}, and it is made again"
            ) from None

    def _shard(self, index: int) -> int:
        return int(np.searchsorted(self._first_record, index, side="right")) - 1

    def _stream(self, shard: int) -> IO[bytes]:
        if shard not in self._open:
            if len(self._open) == OPEN_FILES:
                self._open.popitem(last=False)[1].close()
            file = shard_file(self.folder, shard, "tokens")
            try:
                self._open[shard] = open(file, "rb", buffering=0)
            except OSError as error:
                raise UserError(f"{file}: {error.strerror}; delete {self.folder}, and it is made again") from None
        self._open.move_to_end(shard)
        return self._open[shard]


def _read_manifest(folder: Path) -> dict:
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{folder} holds no finished set of tokens ({MANIFEST} is missing)") from None
    except (OSError, ValueError, RecursionError):
        raise UserError(f"{folder / MANIFEST} is not valid JSON; delete {folder}, and it is made again") from None
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        found = str(manifest.get("format"))[:40] if isinstance(manifest, dict) else None
        raise UserError(f"{folder}: tokens of format {found}, expected {FORMAT}; delete it, and it is made again")
    counts, tokens = manifest.get("counts"), manifest.get("tokens")
    whole = isinstance(counts, dict) and all(type(count) is int for count in (tokens, *counts.values()))
    if not whole or manifest.get("dtype") not in ("uint16", "int32"):
        raise UserError(
            f"{folder / MANIFEST} is not as it was written (counts, tokens, dtype); delete {folder}, and it is made again"
        )
    return manifest


def _read_index(folder: Path) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """lengths, spans, span_counts, shards.

    UserError where they do not fit each other: rows would be read from the wrong place.
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
            raise ValueError("its counts are not those of its records")
        npz.check("spans", spans, "i", (int(span_counts.sum(dtype=np.int64)), 2))
        ends = np.repeat(lengths, span_counts)
        if (spans[:, 0] < 1).any() or (spans[:, 1] <= spans[:, 0]).any() or (spans[:, 1] > ends).any():
            raise ValueError("its spans are not within the records")
    except FileNotFoundError:
        raise UserError(f"{file} is missing; delete {folder}, and it is made again") from None
    except ValueError as error:
        raise UserError(f"{file} is damaged ({error}); delete {folder}, and it is made again") from None
    return lengths, spans, span_counts, shards


def _starts(counts: np.ndarray) -> np.ndarray:
    """int64 [n + 1]: where each begins, and where the last one ends."""
    starts = np.zeros(len(counts) + 1, np.int64)
    np.cumsum(counts, out=starts[1:])
    return starts
