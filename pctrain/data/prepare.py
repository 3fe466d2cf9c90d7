"""Resolve a config: make problems if no data is named, and a fresh model if no directory is named."""

from __future__ import annotations

import time
from pathlib import Path

from pctrain.config.tree import Config, DataConfig, ResolvedConfig
from pctrain.data import arithmetic, scratch_model
from pctrain.distributed.health import watchdog
from pctrain.files.lock import try_lock

LOCK = ".prepare.lock"
POLL = 0.2  # seconds between two looks while another job prepares


def prepare(config: Config, root: Path) -> ResolvedConfig:
    """Return the config with its data and model named; make `root`/data and `root`/model if they are needed and absent.

    The same config gives the same bytes, so a second call (a resumed run) finds what it would make. If several jobs
    start in one folder at once, one makes everything and the others wait.
    """
    root = Path(root)
    resolved = config.with_model(config.model.path or root / "model")
    needed = [] if config.model.path is not None else [resolved.model.path]
    problems: dict[str, Path] = {}
    if config.data.train is None:
        problems = {name: root / "data" / f"{name}.jsonl" for name in arithmetic.SETS}
        given = config.data.model_dump(include=set(problems), exclude_none=True)
        resolved.data = DataConfig.model_validate(config.data.model_dump() | problems | given)
    needed += problems.values()
    release = None
    while not all(path.exists() for path in needed) and release is None:
        root.mkdir(parents=True, exist_ok=True)
        release = try_lock(root / LOCK)
        if release is None:
            watchdog.beat()
            time.sleep(POLL)
    try:
        if not all(path.exists() for path in problems.values()):
            arithmetic.write_sets(config.data.problems, config.run.seed, root / "data")
        if config.model.path is None and not resolved.model.path.exists():
            scratch_model.make(resolved.model.path, config.model.architecture, resolved.data, config.run.seed)
    finally:
        if release is not None:
            (root / LOCK).unlink()  # a job that waits for it finds everything made
            release()
    return resolved
