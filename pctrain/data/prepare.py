"""Fills in what a config leaves out: generated problems where no data is named, a fresh model where no directory is named."""

from __future__ import annotations

from pathlib import Path

from pctrain.config import Config, SourceConfig
from pctrain.data import arithmetic, hf_dir


def prepare(config: Config, root: Path) -> Config:
    """A copy of `config` whose data and model paths are all set; makes `root`/data and `root`/model where they are needed and absent.

    The same config gives the same bytes, so a second call (a resumed run) finds what it would make.
    """
    root = Path(root)
    config = config.model_copy(deep=True)
    if config.data.train is None:
        paths = {name: root / "data" / f"{name}.jsonl" for name in arithmetic.SETS}
        if not all(path.exists() for path in paths.values()):
            paths = arithmetic.write_sets(config.data.problems, config.run.seed, root / "data")
        for name, path in paths.items():
            if getattr(config.data, name) is None:
                setattr(config.data, name, [SourceConfig(path=path)] if name in ("train", "validation") else path)
    if config.model.path is None:
        directory = root / "model"
        if not directory.exists():
            hf_dir.make(config, directory)
        config.model.path = directory
    return config
