"""Checkpoint folders `RUN/checkpoints/step-N`: how one becomes complete, how it is verified, and which are kept.

    step-N.<random>.tmp   being written, or being deleted; removed at the next start
    step-N                complete: it got this name by a rename, after everything in it had reached the disk
    step-N/manifest.json  step, files (bytes, sha256), and what the run was: config, data, ledger, layout, versions

Every attempt has a new `.tmp` name: writers that outlive a killed run cannot reach into the folder of the run that
resumes. The content of a checkpoint is the core's business. Neither torch nor megatron-core is imported here.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import shutil
import time
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from pctrain.common.errors import UserError
from pctrain.files import json_file
from pctrain.files.durable import fsync, sha256, write_atomically
from pctrain.run.names import CHECKPOINTS

MANIFEST = "manifest.json"
_NAME = re.compile(r"^step-(\d+)$")
_DIGESTS = ".sha256.json"  # files that writers leave in a checkpoint with the digests of what they wrote
_THREADS = 8  # hashing releases Python's lock; more threads than this outrun the disk


# ---- finding -------------------------------------------------------------------------------------------------------


def checkpoint_path(folder: Path, step: int) -> Path:
    """Return the path of the checkpoint of `step` in a run folder, whether it exists or not."""
    return folder / CHECKPOINTS / f"step-{step}"


def list_checkpoints(folder: Path) -> list[Path]:
    """Return the checkpoints of a run folder under their final names, by step. They are not verified."""
    paths = [path for path in Path(folder).glob(f"{CHECKPOINTS}/step-*") if path.is_dir() and _NAME.match(path.name)]
    return sorted(paths, key=checkpoint_step)


def checkpoint_step(path: Path) -> int:
    """Return 12 for …/checkpoints/step-12."""
    match = _NAME.match(Path(path).name)
    if match is None:
        raise UserError(f"{path}: expected a checkpoint folder named step-N")
    return int(match[1])


def newest(folder: Path) -> Path | None:
    """Return the newest checkpoint of a run folder, or None if there is none. All its files exist and have their sizes.

    Raises:
        UserError: a file is missing or has another size. The message names it and the newest complete checkpoint to
        resume
            from. The damaged checkpoint is not skipped silently: a step lost without notice is worse than a stop.
    """
    paths = list_checkpoints(folder)
    if not paths:
        return None
    fault = size_fault(paths[-1])
    if fault is not None:
        raise damaged(paths[-1], fault)
    return paths[-1]


# ---- verifying -----------------------------------------------------------------------------------------------------


def has_manifest(path: Path) -> bool:
    """Return whether a folder is a checkpoint: it has a manifest.json."""
    return (path / MANIFEST).is_file()


def read_manifest(path: Path) -> dict[str, Any]:
    """Return manifest.json of a checkpoint. Raises UserError if it is missing or malformed."""
    file = Path(path) / MANIFEST
    if not file.is_file():
        raise UserError(f"{file} is missing")
    manifest = json_file.read_object(file)
    files = manifest.get("files")
    entries = list(files.values()) if isinstance(files, dict) else [None]
    if not all(isinstance(entry, dict) and {"bytes", "sha256"} <= entry.keys() for entry in entries):
        raise UserError(f"{file} is not a manifest, which lists `bytes` and `sha256` of each file")
    return manifest


def size_fault(path: Path) -> str | None:
    """Return what is wrong with a checkpoint's files, or None if all of them exist and have the manifest's sizes."""
    try:
        files = read_manifest(path)["files"]
    except UserError as error:
        return str(error)
    for name, entry in files.items():
        file = Path(path) / name
        if not file.is_file():
            return f"{file} is missing"
        if file.stat().st_size != entry["bytes"]:
            return f"{file} has {file.stat().st_size} bytes, expected {entry['bytes']}"
    return None


def content_faults(path: Path, names: Iterable[str]) -> list[str | None]:
    """Return, for each of the named files, what is wrong with its bytes, or None. Reads them completely."""
    path = Path(path)
    names = list(names)
    files = read_manifest(path)["files"]
    with ThreadPoolExecutor(_THREADS) as threads:
        return list(threads.map(lambda name: _content_fault(path / name, files[name]["sha256"]), names))


def _content_fault(file: Path, expected: str) -> str | None:
    try:
        digest = sha256(file)
    except OSError as error:
        return f"{file} cannot be read ({error.strerror})"
    if digest == expected:
        return None
    return f"{file} was altered: its sha256 is {digest[:12]}…, expected {str(expected)[:12]}…"


def checkpoint_fault(path: Path) -> str | None:
    """Return what is wrong with a checkpoint, in sizes or contents, or None. Reads every byte of it."""
    fault = size_fault(path)
    if fault is not None:
        return fault
    return next(filter(None, content_faults(path, read_manifest(path)["files"])), None)


def damaged(path: Path, fault: str) -> UserError:
    """Return the error for a run's newest checkpoint if it is damaged; it names the newest complete one before it."""
    paths, complete = _up_to(path)
    if complete is None:
        advice = f"delete {_names(paths)} to start this run over"
    else:
        advice = f"delete {_names(paths[paths.index(complete) + 1 :])} to resume from {complete.name}"
    return UserError(f"checkpoint {path}: {fault}; {advice}, or put the file back")


def damaged_start(path: Path, fault: str) -> UserError:
    """Return the error for a checkpoint of another run that this one was to start from."""
    _, complete = _up_to(path)
    other = f"another one, such as {complete}" if complete else "another one"
    return UserError(f"model.checkpoint {path}: {fault}; put the file back, or set model.checkpoint to {other}")


def _up_to(path: Path) -> tuple[list[Path], Path | None]:
    """Return (the checkpoints of a run up to `path`, the newest complete one before it)."""
    step = checkpoint_step(path)
    paths = [other for other in list_checkpoints(path.parent.parent) if checkpoint_step(other) <= step]
    earlier = [other for other in reversed(paths) if checkpoint_step(other) < step]
    return paths, next((other for other in earlier if checkpoint_fault(other) is None), None)


def _names(paths: Iterable[Path]) -> str:
    return " and ".join(path.name for path in paths)


# ---- writing -------------------------------------------------------------------------------------------------------


def begin(final: Path) -> Path:
    """Make a new empty folder to write the checkpoint `final` (…/step-N) into, and return it."""
    temporary = final.with_name(f"{final.name}.{secrets.token_hex(4)}.tmp")
    temporary.mkdir(parents=True)
    return temporary


def note_digests(temporary: Path, files: list[Path], writer: int) -> None:
    """Hash files of a checkpoint that is being written; leave the digests for `commit`. Any process may call it."""
    write_atomically(temporary / f"{writer}{_DIGESTS}", json.dumps(_digests(temporary, files)))


def commit(temporary: Path, final: Path, about: Mapping[str, Any]) -> None:
    """Write the manifest, bring everything to the disk and give the folder its final name, in this order.

    Call it when every rank has finished writing. A kill at any moment leaves the old state or the new one. `about` has
    plain values for the manifest. Files whose writers have not left a digest are hashed here.
    """
    if final.exists():
        raise FileExistsError(f"{final} exists already: a checkpoint is never overwritten")
    digests: dict[str, str] = {}
    for note in temporary.glob(f"*{_DIGESTS}"):
        digests |= json.loads(note.read_text())
        note.unlink()
    files = {path.relative_to(temporary).as_posix(): path for path in sorted(temporary.rglob("*")) if path.is_file()}
    digests |= _digests(temporary, [path for name, path in files.items() if name not in digests])
    entries = {name: {"bytes": path.stat().st_size, "sha256": digests[name]} for name, path in files.items()}
    manifest = temporary / MANIFEST
    manifest.write_text(json.dumps({"step": checkpoint_step(final), **about, "files": entries}, indent=1) + "\n")
    folders = [path for path in temporary.rglob("*") if path.is_dir()]
    for path in [*files.values(), manifest, *folders, temporary]:
        fsync(path)
    os.rename(temporary, final)
    fsync(final.parent)


def _digests(folder: Path, files: list[Path]) -> dict[str, str]:
    """Return {path below the folder: sha256}, hashing several files at a time."""
    with ThreadPoolExecutor(_THREADS) as threads:
        hashes = list(threads.map(sha256, files))
    return {file.relative_to(folder).as_posix(): digest for file, digest in zip(files, hashes, strict=True)}


# ---- deleting ------------------------------------------------------------------------------------------------------


def retire(folder: Path, keep_last: int | None, keep_every: int | None, best: int | None = None) -> list[int]:
    """Delete the checkpoints that are not to be kept, and return their steps. `keep_last` None keeps all.

    Kept are the newest `keep_last`, steps that are multiples of `keep_every`, the step `best`, and always the newest
    complete one.
    """
    paths = list_checkpoints(folder)
    if keep_last is None or len(paths) <= keep_last:
        return []
    kept = set(paths[-keep_last:])
    kept |= {path for path in paths if keep_every and checkpoint_step(path) % keep_every == 0}
    kept |= {path for path in paths if checkpoint_step(path) == best}
    kept |= set([path for path in paths if size_fault(path) is None][-1:])
    dropped = [path for path in paths if path not in kept]
    for path in dropped:
        doomed = path.with_name(f"{path.name}.{secrets.token_hex(4)}.tmp")
        os.rename(path, doomed)  # first, so that a kill never leaves half a checkpoint under a final name
        fsync(path.parent)
        remove_folder(doomed)
    return [checkpoint_step(path) for path in dropped]


def remove_folder(path: Path, patience: float = 30.0) -> None:
    """Delete a folder into which writers of a killed run may still write for a moment; retry for `patience` seconds."""
    end = time.monotonic() + patience
    while path.exists():
        try:
            shutil.rmtree(path)
        except OSError:
            if time.monotonic() > end:
                raise
            time.sleep(0.05)
