"""Builds of the token cache: worker processes tokenize files into a folder (`pctrain.data.store`).

A killed build is resumed.

    job = TokenJob(files, hf_dir, config.data, limit)
    folder = folder_of(cache, job)
    for progress in build(job, folder):
        ...
    store = TokenStore(folder)

Shard K holds chunk K of the files (`sources.split_file`), whichever worker writes it and whenever, so order and bytes
do not depend on the workers. The .json of a shard is written last, so a shard is complete if it exists. A folder is
finished once it has a manifest.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
import time
from collections import Counter
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, TypedDict

import numpy as np
import tokenizers

from pctrain.common.errors import UserError
from pctrain.config.tree import DataConfig
from pctrain.data.encode import Encoder, Sample, Unusable
from pctrain.data.records import Fault
from pctrain.data.sources import CHUNK_BYTES, Chunk, chunk_columns, list_disk_files, read_numbered, split_file
from pctrain.data.store import FORMAT, MANIFEST, is_finished, shard_file
from pctrain.data.workers import HEARTBEAT, in_processes
from pctrain.files.durable import fingerprint, fsync, json_line, plain, write_atomically
from pctrain.files.lock import lock_folder
from pctrain.hf.chat_template import load

# A file that was changed this recently may change again with the same time stamp, so its hash is not remembered.
SETTLED_SECONDS = 2.0


@dataclass(frozen=True)
class TokenJob:
    """The files to tokenize, and how.

    `files` come from `list_files`. `limit` is the maximum number of tokens of a sample. The paths in `data` are not
    used.
    """

    files: Sequence[Path]
    hf_dir: Path
    data: DataConfig
    limit: int


@dataclass(frozen=True)
class Progress:
    """The number of finished shards, of all shards, of records and of tokens.

    Both numbers of shards are 0 while the files are being split, or while another process builds.
    """

    done: int
    total: int
    records: int
    tokens: int


Size = tuple[int, int]  # records and tokens of a shard


class _Refused(UserError):
    """A record that the policies do not allow. The build of this data can never finish."""


def folder_of(cache: Path, job: TokenJob) -> Path:
    """Return the folder for the tokens of `job`.

    Its name is a hash of everything that the tokens depend on: contents and names of the files, the fields, and
    Encoder.digest. The first call reads every byte of the files. Their hashes are remembered in the cache by size and
    time of change.
    """
    hashes = _Hashes(Path(cache))
    parts = {
        "format": FORMAT,
        "files": [[file.name, *map(hashes.look_up, list_disk_files(file))] for file in map(Path, job.files)],
        "fields": job.data.fields.model_dump(),
        "encoder": Encoder(job.hf_dir, job.data, job.limit).digest,
    }
    try:
        hashes.save()
    except OSError as error:
        raise _unwritable(Path(cache), error) from None
    return Path(cache) / hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]


def build(job: TokenJob, folder: Path) -> Iterator[Progress]:
    """Build `folder` (from `folder_of`) unless it is finished. The caller must iterate to the end.

    If several processes call it, one builds and the others wait.

    Raises:
        UserError: a policy does not allow a record (the message names it), no record is usable, a file cannot be read
            or written, or a worker died.
    """
    if is_finished(folder):
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
        release = yield from _wait_for_lock(folder.with_name(f"{folder.name}.lock"))
        try:
            if not is_finished(folder):
                yield from _build(job, folder)
        except _Refused:
            shutil.rmtree(folder)  # nobody can resume it: other data, or another policy, has another folder
            raise
        finally:
            release()
    except OSError as error:
        raise _unwritable(folder, error) from None


def _unwritable(folder: Path, error: OSError) -> UserError:
    return UserError(
        f"{folder}: the tokens cannot be written: {error.strerror or error}. "
        "Free some disk space, or set data.cache to another folder."
    )


def _wait_for_lock(file: Path) -> Generator[Progress, None, Callable[[], None]]:
    while True:
        try:
            return lock_folder(file)
        except UserError:  # another process builds the same folder
            yield Progress(0, 0, 0, 0)
            time.sleep(HEARTBEAT)


def _build(job: TokenJob, folder: Path) -> Iterator[Progress]:
    chunks: list[Chunk] = []
    for file in job.files:
        for chunk in split_file(file, CHUNK_BYTES):
            chunks.append(chunk)
            yield Progress(0, 0, 0, 0)
    done = 0
    records = 0
    tokens = 0
    for size in _write_shards(job, folder, chunks):
        if size is not None:
            done += 1
            records += size[0]
            tokens += size[1]
        yield Progress(done, len(chunks), records, tokens)
    _finish(job, folder, chunks)


# ---- shards ----------------------------------------------------------------------------------------------------------


class Dropped(TypedDict):
    """A record that is not in the set, and why."""

    where: str
    cause: str
    message: str


@dataclass
class _Shard:
    """The content of a shard's .json: everything about its samples except the tokens."""

    part: str  # the chunk that the shard was made from
    dtype: str
    ids: list[str] = field(default_factory=list)
    lengths: list[int] = field(default_factory=list)
    spans: list[list[list[int]]] = field(default_factory=list)
    cut: int = 0
    dropped: list[Dropped] = field(default_factory=list)

    @property
    def size(self) -> Size:
        return len(self.ids), sum(self.lengths)


def _write_shards(job: TokenJob, folder: Path, chunks: list[Chunk]) -> Iterator[Size | None]:
    """Yield the size of each shard in order, after writing it if necessary. Yield None now and then while waiting."""
    finished: dict[int, Size] = {}
    for number, chunk in enumerate(chunks):
        size = _finished_size(folder, number, chunk)
        if size is not None:
            finished[number] = size
    todo = [(number, chunk) for number, chunk in enumerate(chunks) if number not in finished]
    written = _write_missing(job, folder, todo)
    for number in range(len(chunks)):
        if number in finished:
            yield finished[number]
            continue
        while (result := next(written)) is None:
            yield None
        yield result[0]


def _write_missing(job: TokenJob, folder: Path, todo: list[tuple[int, Chunk]]) -> Iterator[tuple[Size] | None]:
    """Yield (size,) of each missing shard after writing it, and None now and then while waiting."""
    workers = min(len(todo), job.data.workers or len(os.sched_getaffinity(0)))
    if workers > 1:
        yield from in_processes(partial(_make_writer, job, folder), todo, workers)
    elif todo:  # starting a process takes longer than tokenizing most small files
        write = _make_writer(job, folder)
        yield from ((write(item),) for item in todo)


def _make_writer(job: TokenJob, folder: Path) -> Callable[[tuple[int, Chunk]], Size]:
    """Return the function by which a process turns (number, chunk) into a shard."""
    encoder = Encoder(job.hf_dir, job.data, job.limit)
    return lambda item: _write_shard(encoder, job.data, folder, *item)


def _write_shard(encoder: Encoder, data: DataConfig, folder: Path, number: int, chunk: Chunk) -> Size:
    """Write the tokens of a chunk, then the .json with everything else. Memory use is bounded by one chunk."""
    tokens_file = shard_file(folder, number, "tokens")
    temporary = tokens_file.with_name(tokens_file.name + ".tmp")
    dtype = np.dtype(np.uint16 if encoder.tokenizer.largest_id < 1 << 16 else np.int32)
    shard = _Shard(repr(chunk), dtype.name)
    with open(temporary, "wb") as stream:
        for id, sample in _samples(encoder, data, chunk, shard.dropped):
            stream.write(sample.tokens.astype(dtype).tobytes())
            shard.ids.append(id)
            shard.lengths.append(len(sample.tokens))
            shard.spans.append(sample.spans.tolist())
            shard.cut += sample.cut
    fsync(temporary)
    os.replace(temporary, tokens_file)
    write_atomically(shard_file(folder, number, "json"), json_line(asdict(shard)))
    return shard.size


def _samples(encoder: Encoder, data: DataConfig, chunk: Chunk, dropped: list[Dropped]) -> Iterator[tuple[str, Sample]]:
    """Yield (id, sample) for every usable record of a chunk.

    Append the others to `dropped`, or raise, as the policies say.
    """
    for number, record in read_numbered(chunk, data.fields, need=("response",)):
        if isinstance(record, Fault):
            fault = record
        else:
            try:
                yield record.id, encoder.encode(record)
                continue
            except Unusable as error:
                fault = Fault(f"{chunk.file}:{number}", error.cause, str(error))
        if encoder.stops(fault.cause):
            raise _Refused(str(fault))
        dropped.append({"where": fault.where, "cause": fault.cause, "message": fault.message})


def _finished_size(folder: Path, number: int, chunk: Chunk) -> Size | None:
    """Return the size of a shard that an earlier build finished from this same chunk, or None if there is none."""
    if not shard_file(folder, number, "json").exists():
        return None
    shard = _read_shard(folder, number)
    return shard.size if shard.part == repr(chunk) else None


def _read_shard(folder: Path, number: int) -> _Shard:
    return _Shard(**json.loads(shard_file(folder, number, "json").read_text(encoding="utf-8")))


# ---- the finished folder ---------------------------------------------------------------------------------------------


@dataclass
class _Index:
    """The index of the samples of all shards, in order."""

    shards: list[int] = field(default_factory=list)  # records of each shard
    lengths: list[np.ndarray] = field(default_factory=list)
    span_counts: list[np.ndarray] = field(default_factory=list)
    spans: list[np.ndarray] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)  # records by what happened to them
    records: Counter[Path] = field(default_factory=Counter)  # records of each file
    dtype: str | None = None
    first_dropped: Dropped | None = None

    def add(self, file: Path, shard: _Shard) -> None:
        self.shards.append(len(shard.ids))
        self.lengths.append(np.array(shard.lengths, np.int32))
        self.span_counts.append(np.array([len(spans) for spans in shard.spans], np.int32))
        flat = [span for spans in shard.spans for span in spans]
        self.spans.append(np.array(flat, np.int32).reshape(-1, 2))
        self.records[file] += len(shard.ids)
        self.counts.update(dropped["cause"] for dropped in shard.dropped)
        if shard.cut:
            self.counts["cut"] += shard.cut
        self.dtype = shard.dtype
        if self.first_dropped is None and shard.dropped:
            self.first_dropped = shard.dropped[0]

    def arrays(self) -> dict[str, np.ndarray]:
        return {
            "shards": np.array(self.shards, np.int64),
            "lengths": np.concatenate(self.lengths),
            "span_counts": np.concatenate(self.span_counts),
            "spans": np.concatenate(self.spans),
        }


def _finish(job: TokenJob, folder: Path, chunks: list[Chunk]) -> None:
    """Join the .json files of the shards, one at a time, and write the manifest last."""
    index = _Index(records=Counter(dict.fromkeys(job.files, 0)))
    with (
        open(folder / "ids.jsonl", "w", encoding="utf-8") as ids,
        open(folder / "dropped.jsonl", "w", encoding="utf-8") as dropped,
    ):
        for number, chunk in enumerate(chunks):
            shard = _read_shard(folder, number)
            index.add(chunk.file, shard)
            ids.writelines(map(json_line, shard.ids))
            dropped.writelines(map(json_line, shard.dropped))
    if not sum(index.shards):
        raise _Refused(_nothing_left(job, index.counts, index.first_dropped))
    arrays = index.arrays()
    write_atomically(folder / "index.npz", _npz(arrays))
    for name in ("ids.jsonl", "dropped.jsonl"):
        fsync(folder / name)
    manifest = _manifest(job, chunks, index, arrays)
    write_atomically(folder / MANIFEST, json.dumps(plain(manifest), indent=1) + "\n")
    for number in range(len(chunks)):  # the other files have all of their content now
        shard_file(folder, number, "json").unlink()


def _manifest(job: TokenJob, chunks: list[Chunk], index: _Index, arrays: dict[str, np.ndarray]) -> dict[str, Any]:
    template = load(job.hf_dir, job.data.template)
    spans = arrays["spans"]
    return {
        "format": FORMAT,
        "records": sum(index.shards),
        "tokens": arrays["lengths"].sum(dtype=np.int64),
        "loss_tokens": (spans[:, 1] - spans[:, 0]).sum(dtype=np.int64),
        "counts": index.counts,
        "dtype": index.dtype,
        "files": [{"path": file, "records": count} for file, count in index.records.items()],
        "columns": {str(chunk.file): chunk_columns(chunk, job.data.fields).describe() for chunk in chunks},
        "template": template and template.where,
        "settings": {
            "limit": job.limit,
            **job.data.model_dump(include={"fields", "loss_on", "overlong", "unusable"}),
        },
        "versions": {"tokenizers": tokenizers.__version__, "numpy": np.__version__},
    }


def _nothing_left(job: TokenJob, counts: Counter[str], first: Dropped | None) -> str:
    names = ", ".join(str(file) for file in job.files)
    if first is None:
        return f"{names}: the data set is empty; expected one record per line or row"
    causes = ", ".join(f"{count} {cause}" for cause, count in counts.most_common())
    return (
        f"{names}: none of the {counts.total()} records can be used ({causes}). "
        f"The first is {Fault(first['where'], first['cause'], first['message'])}"
    )


def _npz(arrays: dict[str, np.ndarray]) -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, allow_pickle=False, **arrays)
    return buffer.getvalue()


# ---- hashes of the files ---------------------------------------------------------------------------------------------


class _Hashes:
    """The sha256 of files, remembered in `<cache>/hashes.json` so that gigabytes are not read again at every start."""

    def __init__(self, cache: Path):
        self._file = cache / "hashes.json"
        try:
            self._known: dict[str, str] = json.loads(self._file.read_text(encoding="utf-8"))
        except (OSError, ValueError):  # only a cache: it is made again
            self._known = {}
        self._new: dict[str, str] = {}

    def look_up(self, file: Path) -> str:
        try:
            state = file.stat()
        except OSError as error:
            raise UserError(f"data file {file} cannot be read: {error.strerror}") from None
        key = json.dumps([str(file.resolve()), state.st_size, state.st_mtime_ns, state.st_ino])
        digest = self._known.get(key) or fingerprint(file)
        if time.time() - state.st_mtime > SETTLED_SECONDS:
            self._new[key] = digest
        return digest

    def save(self) -> None:
        if not self._new.items() <= self._known.items():
            write_atomically(self._file, json.dumps(self._known | self._new, indent=1) + "\n")
