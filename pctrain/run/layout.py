"""Where the runs of a study lie, below its folder. `pctrain run` writes there, reports and fits read there.

sft/, rl-step-N/                         one set without a name, rl.algorithm, run.seed
rl-ALGORITHM-step-N/                     another algorithm (MODULE.CLASS for module:Class)
sets/NAME/sft/, sets/NAME/rl-step-N/     sets with names; RL from step 0 has no SFT before it and lies outside of them
seed-S/...                               another seed: all of the above once more
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

SETS = "sets"
SFT = "sft"
RANKS_FILE = "ranks.json"  # of a run on several ranks: how long each worked at each phase
_RL = re.compile(r"rl-(?:([\w.]+)-)?step-(\d+)")
_SEED = re.compile(r"seed-(\d+)")


@dataclass(frozen=True)
class Place:
    """One run folder. `set`: "" where it lies in no set's folder. `step`: that RL starts from; of SFT 0."""

    folder: Path
    kind: Literal["sft", "rl"]
    set: str
    step: int
    algorithm: str = ""  # where it is not the study's rl.algorithm


def holder(root: Path, set_name: str = "", seed: int | None = None) -> Path:
    """The folder that holds the runs of a set and a seed; `seed` is None for run.seed."""
    root = root if seed is None else root / f"seed-{seed}"
    return root / SETS / set_name if set_name else root


def sft_folder(root: Path, set_name: str = "", seed: int | None = None) -> Path:
    return holder(root, set_name, seed) / SFT


def rl_folder(root: Path, step: int, set_name: str = "", seed: int | None = None, algorithm: str | None = None) -> Path:
    """`algorithm` is None for rl.algorithm."""
    return holder(root, set_name if step else "", seed) / f"rl-{algorithm + '-' if algorithm else ''}step-{step}"


def find_runs(root: Path) -> list[Place]:
    """The run folders of a study that exist: by seed, then by set, SFT first, RL by step and name. [] where `root` is no study."""
    seeds = sorted((int(match[1]), path) for path, match in _matching(root, _SEED))
    return [place for base in [root, *(path for _, path in seeds)] for place in _of_seed(base)]


def _of_seed(base: Path) -> list[Place]:
    named = sorted(path for path in (base / SETS).iterdir() if path.is_dir()) if (base / SETS).is_dir() else []
    return [
        place
        for folder, name in [(base, ""), *((path, path.name) for path in named)]
        for place in _of_set(folder, name)
    ]


def _of_set(folder: Path, name: str) -> list[Place]:
    sft = [Place(folder / SFT, "sft", name, 0)] if (folder / SFT).is_dir() else []
    rl = [Place(path, "rl", name, int(match[2]), match[1] or "") for path, match in _matching(folder, _RL)]
    return sft + sorted(rl, key=lambda place: (place.step, place.folder.name))


def _matching(folder: Path, pattern: re.Pattern) -> list[tuple[Path, re.Match]]:
    found = (
        [(path, pattern.fullmatch(path.name)) for path in folder.iterdir() if path.is_dir()] if folder.is_dir() else []
    )
    return [(path, match) for path, match in found if match]
