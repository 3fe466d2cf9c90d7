"""The run folders of a study, below its folder. `pctrain run` writes there; reports and fits read there.

sft/, rl-step-N/                         one set without a name, rl.algorithm, run.seed
rl-ALGORITHM-step-N/                     another algorithm (MODULE.CLASS for module:Class)
sets/NAME/sft/, sets/NAME/rl-step-N/     sets with names; RL from step 0 has no SFT before it and is outside of them
seed-S/...                               another seed: all of the above once more
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

SETS = "sets"
SFT = "sft"
_RL = re.compile(r"rl-(?:([\w.]+)-)?step-(\d+)")
_SEED = re.compile(r"seed-(\d+)")


@dataclass(frozen=True)
class Place:
    """One run folder of a study.

    `set`: the name of its data set, or "" outside of sets/. `step`: the SFT step that RL starts from; 0 for SFT.
    `algorithm`: "" for the study's rl.algorithm.
    """

    folder: Path
    kind: Literal["sft", "rl"]
    set: str
    step: int
    algorithm: str = ""


def holder(root: Path, set_name: str = "", seed: int | None = None) -> Path:
    """Return the folder that holds the runs of a set and a seed; `seed` is None for run.seed."""
    root = root if seed is None else root / f"seed-{seed}"
    return root / SETS / set_name if set_name else root


def sft_folder(root: Path, set_name: str = "", seed: int | None = None) -> Path:
    """Return the folder of the SFT run of a set and a seed."""
    return holder(root, set_name, seed) / SFT


def rl_folder(root: Path, step: int, set_name: str = "", seed: int | None = None, algorithm: str | None = None) -> Path:
    """Return the folder of the RL run from SFT step `step`; `algorithm` is None for rl.algorithm."""
    prefix = f"rl-{algorithm}" if algorithm else "rl"
    return holder(root, set_name if step else "", seed) / f"{prefix}-step-{step}"


def find_runs(root: Path) -> list[Place]:
    """Return the run folders of a study that exist: by seed, then by set, SFT first, RL by step and name.

    The list is empty if `root` is not a study.
    """
    seeds = sorted((int(match[1]), path) for path, match in _matching(root, _SEED))
    return [place for base in [root, *(path for _, path in seeds)] for place in _runs_of_seed(base)]


def _runs_of_seed(base: Path) -> list[Place]:
    places = _runs_of_set(base, "")
    if (base / SETS).is_dir():
        for path in sorted(path for path in (base / SETS).iterdir() if path.is_dir()):
            places += _runs_of_set(path, path.name)
    return places


def _runs_of_set(folder: Path, name: str) -> list[Place]:
    sft = [Place(folder / SFT, "sft", name, 0)] if (folder / SFT).is_dir() else []
    rl = [Place(path, "rl", name, int(match[2]), match[1] or "") for path, match in _matching(folder, _RL)]
    return sft + sorted(rl, key=lambda place: (place.step, place.folder.name))


def _matching(folder: Path, pattern: re.Pattern[str]) -> list[tuple[Path, re.Match[str]]]:
    """Return the folders inside `folder` whose whole name matches, with the match."""
    if not folder.is_dir():
        return []
    matches = [(path, pattern.fullmatch(path.name)) for path in folder.iterdir() if path.is_dir()]
    return [(path, match) for path, match in matches if match]
