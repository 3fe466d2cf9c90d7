"""Tokenises files into a folder of the cache (`pctrain.data.store`), in worker processes, and goes on where a killed build was.

    job = TokenJob(files, hf_dir, config.data, limit)
    folder = folder_of(cache, job)
    for progress in build(job, folder):
        ...
    store = TokenStore(folder)

Shard K is part K of the files (`sources.split_file`), whichever worker writes it and whenever: order and bytes do not
depend on the workers. A shard is there when its .json is, which is written last; the folder is finished when its
manifest is.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import tokenizers

from pctrain.common.errors import UserError
from pctrain.config.tree import DataConfig
from pctrain.data.encode import Encoder, Sample, Unusable
from pctrain.data.records import Fault
from pctrain.data.sources import CHUNK_BYTES, Chunk, chunk_columns, list_disk_files, read_numbered, split_file
from pctrain.data.store import FORMAT, MANIFEST, is_finished, shard_file
from pctrain.data.workers import HEARTBEAT, in_processes
from pctrain.files.durable import fingerprint, fsync, json_line, plain, write_beside
from pctrain.files.lock import lock_folder
from pctrain.hf.chat_template import load

# A file changed within this time of being hashed may change again without a new time stamp: its hash is not remembered.
SETTLED_SECONDS = 2.0


@dataclass(frozen=True)
class TokenJob:
    """What is tokenised, and how.

    `files`: of `list_files`; `limit`: most tokens of a sample; the paths in `data` are not read.
    """

    files: Sequence[Path]
    hf_dir: Path
    data: DataConfig
    limit: int


@dataclass(frozen=True)
class Progress:
    """Shards finished of those there are (0 of 0 while the files are looked through, or another process builds), records, tokens."""

    done: int
    total: int
    records: int
    tokens: int


Size = tuple[int, int]  # records and tokens of a shard


class _Refused(UserError):
    """A record that a policy stops at: what is built of this very data cannot be finished."""


def folder_of(cache: Path, job: TokenJob) -> Path:
    """Where the tokens of `job` lie, or will: named by all that they depend on (contents and names of the files, fields, Encoder.digest).

    Reads every byte of the files the first time; their hashes are remembered in the cache by size and time of change.
    """
    hashes = _Hashes(Path(cache))
    parts = {
        "format": FORMAT,
        "files": [[file.name, *map(hashes.of, list_disk_files(file))] for file in map(Path, job.files)],
        "fields": job.data.fields.model_dump(),
        "encoder": Encoder(job.hf_dir, job.data, job.limit).digest,
    }
    try:
        hashes.save()
    except OSError as error:
        raise _unwritable(Path(cache), error) from None
    return Path(cache) / hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]


def build(job: TokenJob, folder: Path) -> Iterator[Progress]:
    """Makes `folder` (of `folder_of`) unless it is finished; the caller iterates to the end.

    One process builds, others wait for it.

    Raises:
        UserError: a record that a policy stops at (named), no usable record, a file that cannot be read or written, a
            dead worker.
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
            shutil.rmtree(folder)  # nobody will go on with it: other data, or another policy, has another folder
            raise
        finally:
            release()
    except OSError as error:
        raise _unwritable(folder, error) from None


def _unwritable(folder: Path, error: OSError) -> UserError:
    return UserError(
        f"{folder}: the tokens cannot be written: {error.strerror or error}; free space, or set data.cache"
    )


def _wait_for_lock(file: Path) -> Iterator[Progress]:
    while True:
        try:
            return lock_folder(file)
        except UserError:  # another process builds the same
            yield Progress(0, 0, 0, 0)
            time.sleep(HEARTBEAT)


def _build(job: TokenJob, folder: Path) -> Iterator[Progress]:
    parts: list[Chunk] = []
    for file in job.files:
        for part in split_file(file, CHUNK_BYTES):
            parts.append(part)
            yield Progress(0, 0, 0, 0)
    done = records = tokens = 0
    for size in _shards(job, folder, parts):
        if size is not None:
            done, records, tokens = done + 1, records + size[0], tokens + size[1]
        yield Progress(done, len(parts), records, tokens)
    _finish(job, folder, parts)


# ---- shards
# ------------------------------------------------------------------------------------------------------------


def _shards(job: TokenJob, folder: Path, parts: list[Chunk]) -> Iterator[Size | None]:
    """The size of each shard, in order, written where it is not there yet; None now and then while one is waited for."""
    there = {number: size for number, part in enumerate(parts) if (size := _finished_shard(folder, number, part))}
    missing = len(parts) - len(there)
    workers = min(missing, job.data.workers or len(os.sched_getaffinity(0)))
    if workers <= 1:  # starting a process takes longer than most small files
        encoder = Encoder(job.hf_dir, job.data, job.limit) if missing else None
        yield from (
            there.get(number) or _write_shard(encoder, job.data, folder, number, part)
            for number, part in enumerate(parts)
        )
        return
    todo = [(number, part) for number, part in enumerate(parts) if number not in there]
    written = in_processes(partial(_writer, job, folder), todo, workers)
    for number in range(len(parts)):
        if number in there:
            yield there[number]
            continue
        while (size := next(written)) is None:
            yield None
        yield size[0]


def _writer(job: TokenJob, folder: Path) -> Callable[[tuple[int, Chunk]], Size]:
    """What a worker process does with (number, part)."""
    encoder = Encoder(job.hf_dir, job.data, job.limit)
    return lambda item: _write_shard(encoder, job.data, folder, *item)


def _write_shard(encoder: Encoder, data: DataConfig, folder: Path, number: int, part: Chunk) -> Size:
    """Writes the tokens of a part, then the .json with all else there is to know of it. Memory: one part of a file."""
    tokens_file = shard_file(folder, number, "tokens")
    beside = tokens_file.with_name(tokens_file.name + ".tmp")
    dtype = np.dtype(np.uint16 if encoder.tokenizer.largest_id < 1 << 16 else np.int32)
    about = {"part": repr(part), "dtype": dtype.name, "ids": [], "lengths": [], "spans": [], "cut": 0, "dropped": []}
    with open(beside, "wb") as stream:
        for id, sample in _samples(encoder, data, part, about["dropped"]):
            stream.write(sample.tokens.astype(dtype).tobytes())
            about["ids"].append(id)
            about["lengths"].append(len(sample.tokens))
            about["spans"].append(sample.spans.tolist())
            about["cut"] += sample.cut
    fsync(beside)
    os.replace(beside, tokens_file)
    write_beside(shard_file(folder, number, "json"), json_line(about))
    return len(about["ids"]), sum(about["lengths"])


def _samples(encoder: Encoder, data: DataConfig, part: Chunk, dropped: list[dict]) -> Iterator[tuple[str, Sample]]:
    """(id, sample) of every usable record of a part; the others go into `dropped`, or stop the work."""
    for number, record in read_numbered(part, data.fields, need=("response",)):
        if isinstance(record, Fault):
            fault = record
        else:
            try:
                yield record.id, encoder.encode(record)
                continue
            except Unusable as error:
                fault = Fault(f"{part.file}:{number}", error.cause, str(error))
        if encoder.stops(fault.cause):
            raise _Refused(str(fault))
        dropped.append({"where": fault.where, "cause": fault.cause, "message": fault.message})


def _finished_shard(folder: Path, number: int, part: Chunk) -> Size | None:
    """The size of a shard that an earlier build finished, and of this very part."""
    if not shard_file(folder, number, "json").exists():
        return None
    about = _about(folder, number)
    return (len(about["ids"]), sum(about["lengths"])) if about["part"] == repr(part) else None


def _about(folder: Path, number: int) -> dict:
    return json.loads(shard_file(folder, number, "json").read_text(encoding="utf-8"))


# ---- the finished folder
# -----------------------------------------------------------------------------------------------


def _finish(job: TokenJob, folder: Path, parts: list[Chunk]) -> None:
    """Joins what the shards' .json say, one at a time, and writes the manifest last."""
    shards, lengths, span_counts, spans = [], [], [], []
    counts: Counter[str] = Counter()
    records = dict.fromkeys(job.files, 0)
    first_dropped = dtype = None
    with (
        open(folder / "ids.jsonl", "w", encoding="utf-8") as ids,
        open(folder / "dropped.jsonl", "w", encoding="utf-8") as dropped,
    ):
        for number, part in enumerate(parts):
            about = _about(folder, number)
            shards.append(len(about["ids"]))
            lengths.append(np.array(about["lengths"], np.int32))
            span_counts.append(np.array([len(of_record) for of_record in about["spans"]], np.int32))
            spans.append(
                np.array([span for of_record in about["spans"] for span in of_record], np.int32).reshape(-1, 2)
            )
            records[part.file] += len(about["ids"])
            counts.update(fault["cause"] for fault in about["dropped"])
            counts.update({"cut": about["cut"]} if about["cut"] else {})
            dtype, first_dropped = about["dtype"], first_dropped or next(iter(about["dropped"]), None)
            ids.writelines(map(json_line, about["ids"]))
            dropped.writelines(map(json_line, about["dropped"]))
    if not sum(shards):
        raise _Refused(_nothing_left(job, counts, first_dropped))
    index = {
        "shards": np.array(shards, np.int64),
        "lengths": np.concatenate(lengths),
        "span_counts": np.concatenate(span_counts),
        "spans": np.concatenate(spans),
    }
    write_beside(folder / "index.npz", _npz(index))
    for name in ("ids.jsonl", "dropped.jsonl"):
        fsync(folder / name)
    template = load(job.hf_dir, job.data.template)
    write_beside(
        folder / MANIFEST,
        json.dumps(
            plain(
                {
                    "format": FORMAT,
                    "records": sum(shards),
                    "tokens": index["lengths"].sum(dtype=np.int64),
                    "loss_tokens": (index["spans"][:, 1] - index["spans"][:, 0]).sum(dtype=np.int64),
                    "counts": counts,
                    "dtype": dtype,
                    "files": [{"path": file, "records": count} for file, count in records.items()],
                    "columns": {str(part.file): chunk_columns(part, job.data.fields).describe() for part in parts},
                    "template": template and template.where,
                    "settings": {
                        "limit": job.limit,
                        **job.data.model_dump(include={"fields", "loss_on", "overlong", "unusable"}),
                    },
                    "versions": {"tokenizers": tokenizers.__version__, "numpy": np.__version__},
                }
            ),
            indent=1,
        )
        + "\n",
    )
    for number in range(len(parts)):  # all that they say is in the other files now
        shard_file(folder, number, "json").unlink()


def _nothing_left(job: TokenJob, counts: Counter[str], first: dict | None) -> str:
    names = ", ".join(str(file) for file in job.files)
    if first is None:
        return f"{names}: the data set is empty; expected one record a line or row"
    causes = ", ".join(f"{count} {cause}" for cause, count in counts.most_common())
    return f"{names}: none of the {counts.total()} records can be used ({causes}); the first: {first['where']}: {first['message']}"


def _npz(arrays: dict[str, np.ndarray]) -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    return buffer.getvalue()


# ---- hashes of the files
# -------------------------------------------------------------------------------------------------


class _Hashes:
    """sha256 of files, remembered in `<cache>/hashes.json`: gigabytes are not read again at every start."""

    def __init__(self, cache: Path):
        self._file = cache / "hashes.json"
        try:
            self._known: dict[str, str] = json.loads(self._file.read_text(encoding="utf-8"))
        except (OSError, ValueError):  # a memory, not a record: it is made again
            self._known = {}
        self._new: dict[str, str] = {}

    def of(self, file: Path) -> str:
        try:
            state = file.stat()
        except OSError as error:
            raise UserError(f"data file {file}: {error.strerror}") from None
        key = json.dumps([str(file.resolve()), state.st_size, state.st_mtime_ns, state.st_ino])
        digest = self._known.get(key) or fingerprint(file)
        if time.time() - state.st_mtime > SETTLED_SECONDS:
            self._new[key] = digest
        return digest

    def save(self) -> None:
        if not self._new.items() <= self._known.items():
            write_beside(self._file, json.dumps(self._known | self._new, indent=1) + "\n")
