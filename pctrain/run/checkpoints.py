"""Checkpoint folders `RUN/checkpoints/step-N`: how one becomes complete, how it is proven whole, which are kept.

    step-N.<random>.tmp   being written, or being deleted; swept at the next start
    step-N                complete: it got this name by a rename, after everything in it had reached the disk
    step-N/manifest.json  step, files (bytes, sha256), and what the run was: config, data, ledger, layout, versions

The `.tmp` name is new at every attempt: writers that outlive a killed run cannot reach into the folder of the run that goes on.
What is inside a checkpoint is the core's part. Neither torch nor megatron-core is imported here.
"""

from __future__ import annotations

import hashlib
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
from pctrain.files.durable import fsync, write_beside

MANIFEST, STATE = "manifest.json", "state.json"
LEDGER_SUMS = {
    "sequences",
    "tokens",
    "paper_flops",
    "exact_flops",
    "seconds",
    "device_seconds",
}  # of each phase, in `state.json`
_NAME = re.compile(r"^step-(\d+)$")
_DIGESTS = ".sha256.json"  # beside the files while a checkpoint is being written: what its writers have hashed already
_THREADS = 8  # hashing releases Python's lock; more threads than this outrun the disk


# ---- finding ------------------------------------------------------------------------------------------------------------


def list_checkpoints(folder: Path) -> list[Path]:
    """The checkpoints of a run folder under their final names, by step; not yet proven complete."""
    found = [path for path in Path(folder).glob("checkpoints/step-*") if path.is_dir() and _NAME.match(path.name)]
    return sorted(found, key=checkpoint_step)


def checkpoint_step(path: Path) -> int:
    """12 of …/checkpoints/step-12."""
    match = _NAME.match(Path(path).name)
    if match is None:
        raise UserError(f"{path}: expected a checkpoint folder named step-N")
    return int(match[1])


def newest(folder: Path) -> Path | None:
    """The newest checkpoint of a run folder, every file there with its size; None where there is none.

    UserError where that is not so: it names the file and the newest complete checkpoint to go on from. It is not skipped in silence,
    because a step lost without notice is worse than a stop.
    """
    found = list_checkpoints(folder)
    if found and (fault := size_fault(found[-1])):
        raise damaged(found[-1], fault)
    return found[-1] if found else None


# ---- proving ------------------------------------------------------------------------------------------------------------


def read_manifest(path: Path) -> dict[str, Any]:
    """manifest.json of a checkpoint. ValueError, in words that name the file, where it is missing or none."""
    file = Path(path) / MANIFEST
    try:
        manifest = json.loads(file.read_text())
        for entry in manifest["files"].values():
            entry["bytes"], entry["sha256"]
    except FileNotFoundError:
        raise ValueError(f"{file} is missing") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise ValueError(f"{file} is not a manifest") from None
    return manifest


def read_state(path: Path, *needed: str) -> dict[str, Any]:
    """state.json of a checkpoint: what the run that saved it goes on from. `needed`: keys beside the ledger that must be there.

    Raises:
        UserError: it is missing, or not as a run writes it.
    """
    file = Path(path) / STATE
    try:
        state = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{file} not found; name a checkpoint of a run, RUN/checkpoints/step-N") from None
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{file} cannot be read ({error}); take the checkpoint from its source again") from None
    fault = _state_fault(state) or next((f"`{key}` is missing" for key in needed if key not in state), None)
    if fault is not None:
        raise UserError(f"{file}: {fault}; it is not as a run wrote it: take the checkpoint from its source again")
    return state


def _state_fault(state: Any) -> str | None:
    """What of a state is not there, or of another kind, in words."""
    if (
        not isinstance(state, dict)
        or not isinstance(state.get("ledger"), dict)
        or not isinstance(state["ledger"].get("totals"), dict)
    ):
        return "`ledger.totals` is missing"
    totals = state["ledger"]["totals"]
    if not all(isinstance(total, dict) and total.keys() >= LEDGER_SUMS for total in totals.values()):
        return f"`ledger.totals` must have {', '.join(sorted(LEDGER_SUMS))} of each phase"
    prompts = state.get("prompts", {"position": 0, "carried": []})
    if not isinstance(prompts, dict) or not isinstance(prompts.get("carried"), list):
        return "`prompts` must have `position` and `carried`"
    validations, losses = state.get("validations", []), state.get("recent_losses", [])
    if not isinstance(validations, list) or not all(
        isinstance(entry, list) and len(entry) == 5 for entry in validations
    ):
        return "`validations` must be a list of lists of 5"
    if not isinstance(losses, list):
        return "`recent_losses` must be a list"
    numbers = [
        state["ledger"].get("joint"),
        *losses,
        *(value for total in totals.values() for value in total.values()),
        *(value for entry in validations for value in entry[:4]),
    ]
    if not all(_is_number(value) for value in numbers):
        return "one of its numbers is missing, negative, not finite or none"
    counts = [
        state.get("skipped_in_a_row", 0),
        prompts.get("position"),
        *prompts["carried"],
        *(entry[0] for entry in validations),
    ]
    flags = [entry[4] for entry in validations]
    if not all(isinstance(value, int) and _is_number(value) for value in counts) or not all(
        isinstance(flag, bool) for flag in flags
    ):
        return "one of its counts is no whole number"
    return None


def _is_number(value: Any) -> bool:
    """Finite, 0 or more, and not above what a float holds."""
    return not isinstance(value, bool) and isinstance(value, (int, float)) and 0 <= value < 1e300


def size_fault(path: Path) -> str | None:
    """What is wrong with a checkpoint, in words that name the file; None where every file of its manifest has its size."""
    try:
        files = read_manifest(path)["files"]
    except ValueError as error:
        return str(error)
    for name, entry in files.items():
        file = Path(path) / name
        if not file.is_file():
            return f"{file} is missing"
        if file.stat().st_size != entry["bytes"]:
            return f"{file} has {file.stat().st_size} bytes, expected {entry['bytes']}"
    return None


def content_faults(path: Path, names: Iterable[str]) -> list[str | None]:
    """For each of the named files: what is wrong with its bytes, or None. Reads them whole; their sizes are right already."""
    path, names, files = Path(path), list(names), read_manifest(path)["files"]
    with ThreadPoolExecutor(_THREADS) as threads:
        return list(threads.map(lambda name: _content_fault(path / name, files[name]["sha256"]), names))


def _content_fault(file: Path, expected: str) -> str | None:
    try:
        digest = _sha256(file)
    except OSError as error:
        return f"{file} cannot be read ({error.strerror})"
    return (
        None if digest == expected else f"{file} was altered: its sha256 is {digest[:12]}…, expected {expected[:12]}…"
    )


def checkpoint_fault(path: Path) -> str | None:
    """What is wrong with a checkpoint, sizes and contents; None: nothing. Reads every byte of it."""
    return size_fault(path) or next(filter(None, content_faults(path, read_manifest(path)["files"])), None)


def damaged(path: Path, fault: str) -> UserError:
    """The error for the newest checkpoint of a run that cannot be loaded, with the newest complete one before it as the way out."""
    found, whole = _with_last_whole(path)
    spoilt = found[found.index(whole) + 1 :] if whole else found
    names = " and ".join(other.name for other in spoilt)
    advice = f"delete {names} to go on from {whole.name}" if whole else f"delete {names} to begin this run anew"
    return UserError(f"checkpoint {path}: {fault}; {advice}, or put the file back")


def damaged_start(path: Path, fault: str) -> UserError:
    """The same for a checkpoint of another run, which this one was to start from."""
    _, whole = _with_last_whole(path)
    other = f"another one, such as {whole}" if whole else "another one"
    return UserError(f"model.checkpoint {path}: {fault}; put the file back, or set model.checkpoint to {other}")


def _with_last_whole(path: Path) -> tuple[list[Path], Path | None]:
    """(the checkpoints of its run up to `path`, the newest complete one among those before it)."""
    step = checkpoint_step(path)
    found = [other for other in list_checkpoints(path.parent.parent) if checkpoint_step(other) <= step]
    return found, next(
        (other for other in reversed(found) if checkpoint_step(other) < step and checkpoint_fault(other) is None), None
    )


def sha256(files: list[Path]) -> list[str]:
    """sha256 of each file in hex, several at a time."""
    with ThreadPoolExecutor(_THREADS) as threads:
        return list(threads.map(_sha256, files))


def _sha256(file: Path) -> str:
    with open(file, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


# ---- writing ------------------------------------------------------------------------------------------------------------


def begin(final: Path) -> Path:
    """A new empty folder to write the checkpoint `final` (…/step-N) into."""
    temporary = final.with_name(f"{final.name}.{secrets.token_hex(4)}.tmp")
    temporary.mkdir(parents=True)
    return temporary


def note_digests(temporary: Path, files: list[Path], writer: int) -> None:
    """Hash files of a checkpoint that is being written and leave the digests beside them, for `commit`. Any process may call it."""
    digests = {
        file.relative_to(temporary).as_posix(): digest for file, digest in zip(files, sha256(files), strict=True)
    }
    write_beside(temporary / f"{writer}{_DIGESTS}", json.dumps(digests))


def commit(temporary: Path, final: Path, about: Mapping[str, Any]) -> None:
    """Write the manifest, bring everything to the disk and give the folder its final name, in this order.

    Call it when every rank has finished writing. A kill at any moment leaves the old state or the new one. `about`: plain values for
    the manifest. Files whose writers have not left a digest are hashed here.
    """
    if final.exists():
        raise FileExistsError(f"{final} exists already: a checkpoint is never overwritten")
    known: dict[str, str] = {}
    for note in temporary.glob(f"*{_DIGESTS}"):
        known |= json.loads(note.read_text())
        note.unlink()
    files = sorted(path for path in temporary.rglob("*") if path.is_file())
    names = [path.relative_to(temporary).as_posix() for path in files]
    rest = [path for path, name in zip(files, names, strict=True) if name not in known]
    known |= {path.relative_to(temporary).as_posix(): digest for path, digest in zip(rest, sha256(rest), strict=True)}
    entries = {
        name: {"bytes": path.stat().st_size, "sha256": known[name]} for path, name in zip(files, names, strict=True)
    }
    manifest = temporary / MANIFEST
    manifest.write_text(json.dumps({"step": checkpoint_step(final), **about, "files": entries}, indent=1) + "\n")
    for path in [*files, manifest, *(path for path in temporary.rglob("*") if path.is_dir()), temporary]:
        fsync(path)
    os.rename(temporary, final)
    fsync(final.parent)


# ---- deleting -----------------------------------------------------------------------------------------------------------


def retire(folder: Path, keep_last: int | None, keep_every: int | None, best: int | None = None) -> list[int]:
    """Delete what the retention does not keep; returns the steps. `keep_last` None: all stay.

    Kept: the newest `keep_last`, steps that are multiples of `keep_every`, the step `best`, and always the newest complete one.
    """
    found = list_checkpoints(folder)
    if keep_last is None or len(found) <= keep_last:
        return []
    kept = set(found[-keep_last:])
    kept |= {path for path in found if keep_every and checkpoint_step(path) % keep_every == 0}
    kept |= {path for path in found if checkpoint_step(path) == best}
    kept |= set([path for path in found if size_fault(path) is None][-1:])
    dropped = [path for path in found if path not in kept]
    for path in dropped:
        doomed = path.with_name(f"{path.name}.{secrets.token_hex(4)}.tmp")
        os.rename(path, doomed)  # first, so that a kill never leaves half a checkpoint under a final name
        fsync(path.parent)
        remove_folder(doomed)
    return [checkpoint_step(path) for path in dropped]


def remove_folder(path: Path, patience: float = 30.0) -> None:
    """Delete a folder into which writers of a killed run may still write for a moment: tries again for `patience` seconds."""
    end = time.monotonic() + patience
    while path.exists():
        try:
            shutil.rmtree(path)
        except OSError:
            if time.monotonic() > end:
                raise
            time.sleep(0.05)
