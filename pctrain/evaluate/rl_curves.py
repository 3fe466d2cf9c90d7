"""Checkpoints of RL runs as curves for `pctrain fit` and `pctrain report`: score against EFLOPs of RL."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pctrain.evaluate.statistics import Estimate
from pctrain.evaluate.targets import Target
from pctrain.run.checkpoints import checkpoint_path
from pctrain.run.config_file import read_config


def curves_of(targets: Sequence[Target], scores: Mapping[str, Estimate]) -> tuple[list[dict[str, Any]], list[str]]:
    """Return (curves in the plain JSON form of report/plain_curves.py, messages for the user).

    Args:
        targets: all models of the evaluation. A curve begins with the score of the weights its run started from, so
        these
            have to be among them.
        scores: the mean over problems of each target, by its name.
    """
    curves: dict[Path, dict[str, Any]] = {}
    messages = []
    runs = dict.fromkeys(target.run.resolve() for target in targets if target.kind == "rl" and target.run is not None)
    for run in runs:
        start = _start_target(run, targets)
        points = _points(run, targets, scores)
        if start is None:
            messages.append(
                f"{run.name}: no curve, for its start {_start_path(run)} is not among the models: give it as well"
            )
        elif points:
            curves[run] = _curve(run.name, scores[start.name], points)
    _distinguish_names(curves)
    return list(curves.values()), messages


def document(curves: Sequence[Mapping[str, Any]]) -> str:
    """Return the text of curves.json."""
    return json.dumps({"curves": list(curves)}, indent=1, allow_nan=False) + "\n"


def _curve(name: str, start: Estimate, points: Mapping[float, Estimate]) -> dict[str, Any]:
    """Return a curve. `points`: {EFLOPs of RL: score}."""
    return {
        "name": name,
        "p_sft": 100 * start.value,
        "p_sft_se": 100 * start.se,
        "eflops": list(points),
        "scores": [100 * estimate.value for estimate in points.values()],
        "score_se": 100 * float(np.median([estimate.se for estimate in points.values()])),
    }


def _distinguish_names(curves: Mapping[Path, dict[str, Any]]) -> None:
    """Replace names that several curves share by the paths of their runs."""
    counts = Counter(curve["name"] for curve in curves.values())
    for run, curve in curves.items():
        if counts[curve["name"]] > 1:
            curve["name"] = str(run)


def _targets_of(run: Path, targets: Sequence[Target]) -> list[tuple[float, Target]]:
    """Return (EFLOPs of RL, target) for the checkpoints of an RL run."""
    return [
        (target.eflops_rl, target)
        for target in targets
        if target.kind == "rl"
        and target.run is not None
        and target.run.resolve() == run
        and target.eflops_rl is not None
    ]


def _points(run: Path, targets: Sequence[Target], scores: Mapping[str, Estimate]) -> dict[float, Estimate]:
    """Return {EFLOPs of RL: score} of the checkpoints after the start."""
    in_order = sorted(_targets_of(run, targets), key=lambda pair: pair[0])
    return {eflops: scores[target.name] for eflops, target in in_order if eflops > 0}


def _start_path(run: Path) -> Path | None:
    """Return the checkpoint or the Hugging Face directory that an RL run began from."""
    model = read_config(run)[0].model
    return model.checkpoint or model.path


def _start_target(run: Path, targets: Sequence[Target]) -> Target | None:
    """Return the target with the weights that an RL run began from."""
    start = _start_path(run)
    if start is None:
        return None
    for target in targets:
        places = [target.path, target.checkpoint or target.hf_dir]
        if target.run is not None and target.step is not None:
            places.append(checkpoint_path(target.run, target.step))  # a run's final weights are its last checkpoint's
        if start.resolve() in [place.resolve() for place in places]:
            return target
    return next((target for eflops, target in _targets_of(run, targets) if eflops == 0), None)
