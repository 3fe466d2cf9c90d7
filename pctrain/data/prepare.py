"""Preparation of a run: generated problems if the config names no data, a fresh model if it names no model directory."""

from __future__ import annotations

import time
from pathlib import Path

from pctrain.config.tree import Config, SourceConfig
from pctrain.data import arithmetic
from pctrain.data import scratch_model as hf_dir
from pctrain.distributed.health import watchdog
from pctrain.files.lock import try_lock

LOCK = ".prepare.lock"
WAIT = 0.2  # seconds between two checks for the files of another job


def prepare(config: Config, root: Path) -> Config:
    """Return a copy of `config` with all data and model paths set.

    Make `root`/data and `root`/model if they are needed.

    The same config gives the same bytes, so a second call (a resumed run) finds the files that it would make. If
    several jobs start in one folder at once, one makes the files and the others wait.
    """
    root = Path(root)
    config = config.model_copy(deep=True)
    paths = {name: root / "data" / f"{name}.jsonl" for name in arithmetic.SETS} if config.data.train is None else {}
    needed = [*paths.values(), *([root / "model"] if config.model.path is None else [])]
    release = None
    while not all(path.exists() for path in needed) and release is None:
        root.mkdir(parents=True, exist_ok=True)
        release = try_lock(root / LOCK)
        if release is None:
            watchdog.beat()
            time.sleep(WAIT)
    try:
        _make(config, root, paths)
    finally:
        if release is not None:
            (root / LOCK).unlink()  # waiting jobs find everything made
            release()
    return config


def _make(config: Config, root: Path, paths: dict[str, Path]) -> None:
    if not all(path.exists() for path in paths.values()):
        arithmetic.write_sets(config.data.problems, config.run.seed, root / "data")
    for name, path in paths.items():
        if getattr(config.data, name) is None:
            setattr(config.data, name, [SourceConfig(path=path)] if name in ("train", "validation") else path)
    if config.model.path is None:
        directory = root / "model"
        if not directory.exists():
            hf_dir.make(config, directory)
        config.model.path = directory
