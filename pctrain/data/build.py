"""Tokenises files into a folder of the cache (`pctrain.data.store`), in worker processes, and goes on where a killed build was.

    job = TokenJob(files, hf_dir, config.data, limit)
    folder = folder_of(cache, job)
    for progress in build(job, folder):
        ...
    store = TokenStore(folder)

Shard K is part K of the files (`sources.chunks`), whichever worker writes it and whenever: order and bytes do not depend on the workers.
A shard is there when its .json is, which is written last; the folder is finished when its manifest is.
"""

from __future__ import annotations

import hashlib
import io
import json
import multiprocessing
import os
import shutil
import signal
import threading
import time
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing import connection
from pathlib import Path

import numpy as np
import tokenizers

from pctrain.config import DataConfig
from pctrain.data.encode import Encoder, Sample, Unusable
from pctrain.data.records import Fault
from pctrain.data.sources import Chunk, chunks, columns_of, parts_of, read_chunk
from pctrain.data.store import FORMAT, MANIFEST, is_finished, shard_file
from pctrain.durable import fingerprint, fsync, json_line, plain, write_beside
from pctrain.errors import UserError
from pctrain.lock import lock_folder

HEARTBEAT = 0.5  # seconds: the longest time between two values of `build`, but for one shard written in this process
AHEAD = 3  # shards a worker may be ahead of the one that is waited for
# A file changed within this time of being hashed may change again without a new time stamp: its hash is not remembered.
SETTLED_SECONDS = 2.0


@dataclass(frozen=True)
class TokenJob:
    """What is tokenised, and how. `limit`: most tokens of a sample; of `data`, the files' names are not read."""

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


class _Refused(UserError):
    """A record that a policy stops at: what is built of this very data cannot be finished."""


def folder_of(cache: Path, job: TokenJob) -> Path:
    """Where the tokens of `job` lie, or will: named by all that they depend on (contents and names of the files, fields, Encoder.digest).

    Reads every byte of the files the first time; their hashes are remembered in the cache by size and time of change.
    """
    hashes = _Hashes(Path(cache))
    parts = {"format": FORMAT, "files": [[file.name, *map(hashes.of, parts_of(file))] for file in map(Path, job.files)],
             "fields": job.data.fields.model_dump(), "encoder": Encoder(job.hf_dir, job.data, job.limit).digest}
    hashes.save()
    return Path(cache) / hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]


def build(job: TokenJob, folder: Path) -> Iterator[Progress]:
    """Makes `folder` (of `folder_of`) unless it is finished; the caller iterates to the end. One process builds, others wait for it.

    Raises:
        UserError: a record that a policy stops at (named), no usable record, a file that cannot be read or written, a dead worker.
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
        raise UserError(f"{folder}: the tokens cannot be written: {error.strerror or error}; free space, or set data.cache") from None


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
        for part in chunks(file):
            parts.append(part)
            yield Progress(0, 0, 0, 0)
    shards: list[dict] = []
    records = tokens = 0
    for shard in _shards(job, folder, parts):
        if shard is not None:
            shards.append(shard)
            records, tokens = records + shard["records"], tokens + shard["tokens"]
        yield Progress(len(shards), len(parts), records, tokens)
    if not records:
        raise _Refused(_nothing_left(job, shards))
    _finish(job, folder, parts, shards)


# ---- shards ------------------------------------------------------------------------------------------------------------


def _shards(job: TokenJob, folder: Path, parts: list[Chunk]) -> Iterator[dict | None]:
    """What is in each shard, in order, written where it is not there yet; None now and then while one is waited for."""
    there = {number: shard for number, part in enumerate(parts) if (shard := _finished_shard(folder, number, part))}
    missing = len(parts) - len(there)
    workers = min(missing, job.data.workers or len(os.sched_getaffinity(0)))
    if workers <= 1:  # starting a process takes longer than most small files
        encoder = Encoder(job.hf_dir, job.data, job.limit) if missing else None
        yield from (there.get(number) or _write_shard(encoder, job.data, folder, number, part) for number, part in enumerate(parts))
        return
    context = multiprocessing.get_context("spawn")  # a fork would copy the threads' locks of torch and tokenizers
    pool = ProcessPoolExecutor(workers, context, _start_worker, (job, folder))
    try:
        yield from _in_order(pool, there, parts, workers)
    except BrokenProcessPool:
        raise UserError(f"{folder}: a process that tokenises has died (killed by the system for its memory?); "
                        "what it had finished is kept; start again, with fewer data.workers") from None
    finally:
        pool.shutdown(cancel_futures=True)


def _in_order(pool: ProcessPoolExecutor, there: dict[int, dict], parts: list[Chunk], workers: int) -> Iterator[dict | None]:
    """In the order of the parts, so that of several bad records the first one is reported, whichever worker is the faster."""
    waiting: deque[Future | dict] = deque()
    left = enumerate(parts)
    while True:
        while len(waiting) < workers * AHEAD and (pair := next(left, None)):
            waiting.append(there.get(pair[0]) or pool.submit(_write_in_worker, *pair))
        if not waiting:
            return
        head = waiting.popleft()
        while isinstance(head, Future) and not wait([head], HEARTBEAT).done:
            yield None
        yield head.result() if isinstance(head, Future) else head


_in_worker: tuple | None = None  # arguments of `_write_shard` that all parts share, in a worker process


def _start_worker(job: TokenJob, folder: Path) -> None:
    global _in_worker
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which stops this process
    threading.Thread(target=_die_with_parent, daemon=True).start()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # there is a worker for every core already
    _in_worker = (Encoder(job.hf_dir, job.data, job.limit), job.data, folder)


def _die_with_parent() -> None:
    """A killed parent cannot stop its workers, and the pool's queue, which they hold open themselves, would let them wait for ever."""
    connection.wait([multiprocessing.parent_process().sentinel])
    os._exit(1)


def _write_in_worker(number: int, part: Chunk) -> dict:
    return _write_shard(*_in_worker, number, part)


def _write_shard(encoder: Encoder, data: DataConfig, folder: Path, number: int, part: Chunk) -> dict:
    """Writes one shard; returns what its .json says. Memory: one part of a file."""
    tokens_file = shard_file(folder, number, "tokens")
    beside = tokens_file.with_name(tokens_file.name + ".tmp")
    dtype = np.dtype(np.uint16 if encoder.tokenizer.largest_id < 1 << 16 else np.int32)
    ids, lengths, span_counts, spans, dropped, cut = [], [], [], [], [], 0
    with open(beside, "wb") as stream:
        for id, sample in _samples(encoder, data, part, dropped):
            stream.write(sample.tokens.astype(dtype).tobytes())
            ids.append(json_line(id))
            lengths.append(len(sample.tokens))
            span_counts.append(len(sample.spans))
            spans.append(sample.spans)
            cut += sample.cut
    fsync(beside)
    os.replace(beside, tokens_file)
    write_beside(shard_file(folder, number, "ids"), "".join(ids))
    index = {"lengths": np.array(lengths, np.int32), "span_counts": np.array(span_counts, np.int32),
             "spans": np.concatenate([np.empty((0, 2), np.int32), *spans])}
    write_beside(shard_file(folder, number, "npz"), _npz(index))
    shard = {"part": repr(part), "records": len(ids), "tokens": sum(lengths), "cut": cut, "dropped": dropped, "dtype": dtype.name}
    write_beside(shard_file(folder, number, "json"), json_line(shard))
    return shard


def _samples(encoder: Encoder, data: DataConfig, part: Chunk, dropped: list[dict]) -> Iterator[tuple[str, Sample]]:
    """(id, sample) of every usable record of a part; the others go into `dropped`, or stop the work."""
    for record in read_chunk(part, data.fields, need=("response",)):
        if isinstance(record, Fault):
            fault = record
        else:
            try:
                yield record.id, encoder.encode(record)
                continue
            except Unusable as error:
                fault = Fault(record.id, error.cause, str(error))
        if encoder.stops(fault.cause):
            raise _Refused(str(fault))
        dropped.append({"where": fault.where, "cause": fault.cause, "message": fault.message})


def _finished_shard(folder: Path, number: int, part: Chunk) -> dict | None:
    """What the .json of a shard says, where an earlier build finished it, and of this very part."""
    file = shard_file(folder, number, "json")
    if not file.exists():
        return None
    shard = json.loads(file.read_text(encoding="utf-8"))
    return shard if shard["part"] == repr(part) else None


# ---- the finished folder -----------------------------------------------------------------------------------------------


def _finish(job: TokenJob, folder: Path, parts: list[Chunk], shards: list[dict]) -> None:
    index: dict[str, list[np.ndarray]] = {"lengths": [], "span_counts": [], "spans": []}
    for number in range(len(shards)):
        with np.load(shard_file(folder, number, "npz")) as arrays:
            for name, values in index.items():
                values.append(arrays[name])
    joined = {name: np.concatenate(values) for name, values in index.items()}
    write_beside(folder / "index.npz", _npz({**joined, "shards": np.array([shard["records"] for shard in shards], np.int64)}))
    dropped = [fault for shard in shards for fault in shard["dropped"]]
    write_beside(folder / "dropped.jsonl", "".join(map(json_line, dropped)))
    cut = sum(shard["cut"] for shard in shards)
    records: Counter[Path] = Counter()
    for part, shard in zip(parts, shards, strict=True):
        records[part.file] += shard["records"]
    encoder = Encoder(job.hf_dir, job.data, job.limit)
    write_beside(folder / MANIFEST, json.dumps(plain({
        "format": FORMAT,
        "records": len(joined["lengths"]),
        "tokens": int(joined["lengths"].sum(dtype=np.int64)),
        "loss_tokens": int((joined["spans"][:, 1] - joined["spans"][:, 0]).sum(dtype=np.int64)),
        "counts": dict(Counter(fault["cause"] for fault in dropped)) | ({"cut": cut} if cut else {}),
        "dtype": shards[0]["dtype"],
        "files": [{"path": file, "records": records[file]} for file in job.files],
        "columns": {str(part.file): columns_of(part, job.data.fields).describe() for part in parts},
        "template": encoder.template and encoder.template.where,
        "settings": {"limit": job.limit, **job.data.model_dump(include={"fields", "loss_on", "overlong", "unusable"})},
        "versions": {"tokenizers": tokenizers.__version__, "numpy": np.__version__},
    }), indent=1) + "\n")
    for number in range(len(shards)):  # the index holds what they say
        shard_file(folder, number, "npz").unlink()
        shard_file(folder, number, "json").unlink()


def _nothing_left(job: TokenJob, shards: list[dict]) -> str:
    names = ", ".join(str(file) for file in job.files)
    dropped = [fault for shard in shards for fault in shard["dropped"]]
    if not dropped:
        return f"{names}: the data set is empty; expected one record a line or row"
    causes = ", ".join(f"{count} {cause}" for cause, count in Counter(fault["cause"] for fault in dropped).most_common())
    first = dropped[0]
    return f"{names}: none of the {len(dropped)} records can be used ({causes}); the first: {first['where']}: {first['message']}"


def _npz(arrays: dict[str, np.ndarray]) -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    return buffer.getvalue()


# ---- hashes of the files -------------------------------------------------------------------------------------------------


class _Hashes:
    """sha256 of files, remembered in `<cache>/hashes.json`: gigabytes are not read again at every start."""

    def __init__(self, cache: Path):
        self._file = cache / "hashes.json"
        try:
            self._known: dict[str, str] = json.loads(self._file.read_text(encoding="utf-8"))
        except (FileNotFoundError, ValueError):  # a memory, not a record: it is made again
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
