"""Checkpoints of RL runs as curves that `pctrain fit` and `pctrain report` read: score against EFLOPs from the SFT/RL joint."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pctrain.evaluate.statistics import Estimate
from pctrain.evaluate.targets import Target
from pctrain.run.folder import read_config


def curves_of(targets: Sequence[Target], scores: Mapping[str, Estimate]) -> tuple[list[dict[str, Any]], list[str]]:
    """(curves in the plain JSON form of ceiling/plain_curves.py, what has to be said).

    scores: of each target by its name, the mean over problems. A curve begins with the score of the weights its run started from, which
    have to be among the targets.
    """
    curves, said = [], []
    runs = dict.fromkeys(target.run.resolve() for target in targets if target.kind == "rl" and target.run is not None)
    for run in runs:
        points = {
            target.eflops_rl: scores[target.name]
            for target in sorted(_of(run, targets), key=lambda t: t.eflops_rl)
            if target.eflops_rl > 0
        }
        joint = _joint(run, targets)
        if joint is None:
            said.append(f"{run.name}: no curve, for its start {_start(run)} is not among the models: give it as well")
        elif points:
            errors = [estimate.se for estimate in points.values()]
            curves.append(
                {
                    "name": run.name,
                    "p_sft": 100 * scores[joint.name].value,
                    "p_sft_se": 100 * scores[joint.name].se,
                    "eflops": list(points),
                    "scores": [100 * estimate.value for estimate in points.values()],
                    "score_se": 100 * float(np.median(errors)),
                }
            )
    names = [curve["name"] for curve in curves]
    for curve, run in zip(curves, [run for run in runs if _joint(run, targets) is not None], strict=False):
        if names.count(curve["name"]) > 1:
            curve["name"] = str(run)
    return curves, said


def document(curves: Sequence[Mapping[str, Any]]) -> str:
    return json.dumps({"curves": list(curves)}, indent=1, allow_nan=False) + "\n"


def _of(run: Path, targets: Sequence[Target]) -> list[Target]:
    return [
        target for target in targets if target.kind == "rl" and target.run is not None and target.run.resolve() == run
    ]


def _start(run: Path) -> Path | None:
    """The checkpoint or the Hugging Face directory that an RL run began from."""
    model = read_config(run)[0].model
    return model.checkpoint or model.path


def _joint(run: Path, targets: Sequence[Target]) -> Target | None:
    start = _start(run)
    if start is None:
        return None
    for target in targets:
        places = [target.path, target.checkpoint or target.hf_dir]
        if target.run is not None:  # the final weights of a run are those of its last checkpoint
            places.append(target.run / "checkpoints" / f"step-{target.step}")
        if start.resolve() in [place.resolve() for place in places]:
            return target
    return next((target for target in _of(run, targets) if target.eflops_rl == 0), None)
