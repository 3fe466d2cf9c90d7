"""Read score-against-compute curves of RL runs.

They come from run folders of pctrain, plain files (plain_curves.py), or the exchange format, JSON.

The exchange format, one file for many curves:

    {"meta": {"benchmarks": {name: number of problems},
              "model": {fields of a Hugging Face config.json; optional},
              "max_score": the highest possible overall score, percent; optional},
     "datasets": {name: {"sft": [{"eflops": E, "scores": {benchmark: percent}}, ...],  # along SFT
                         "rl": {step: [{"eflops": E, "scores": {...}}, ...], ...},  # E from the checkpoint at `step`
                         "checkpoint_steps": [...], "batch_size": n, "mean_seq_len": tokens}}}

A score is the mean over all problems: the benchmarks' means, weighted by their numbers of problems. The P_sft of a
checkpoint is the `sft` entry nearest to it in EFLOPs. If `checkpoint_steps` and `sft` are equally long, they are the
same points. Otherwise a checkpoint's EFLOPs are the paper's SFT FLOPs of its step, for the model in `meta.model` or for
Qwen2.5-7B, the model of the published curves.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from pctrain.ceiling import checks
from pctrain.ceiling.curve import Curve
from pctrain.common.errors import UserError
from pctrain.compute import flops
from pctrain.compute.model_shape import QWEN2_5_7B, ModelShape
from pctrain.hf.config import model_shape
from pctrain.report import plain_curves
from pctrain.run import layout
from pctrain.run.documents import read_start
from pctrain.run.names import METRICS
from pctrain.run.records import has_metrics, read_metrics

# An `sft` entry this near, as a share of the EFLOPs and in EFLOPs, gives P_sft. Files round EFLOPs to two decimals.
NEAREST_SHARE, NEAREST_EFLOPS = 0.10, 0.005
MAX_DIGITS = 12  # of a step
MAX_PROBLEMS = 1e12  # of a benchmark


def read_curves(path: Path | str) -> list[Curve]:
    """Read the curves of a file, of an RL run folder, or of all RL runs of a study, ordered by seed, set and step."""
    path = Path(path)
    if path.is_file():
        return _read_file(path)
    if not path.exists():
        raise UserError(f"{path}: no such file or folder. Give a curves file (JSON or CSV) or a run folder.")
    if has_metrics(path):
        return [read_run_folder(path)]
    places = [place for place in layout.find_runs(path) if place.kind == "rl" and has_metrics(place.folder)]
    if not places:
        raise UserError(
            f"{path}: neither a run folder (metrics.jsonl) nor a study with RL runs (rl-step-N/metrics.jsonl). "
            "Give the folder of an RL run or of a study."
        )
    return [replace(read_run_folder(place.folder), dataset=_name(path, place)) for place in places]


def _name(study: Path, place: layout.Place) -> str:
    """Return what separates a run from the others of its study besides its step: seed, set and algorithm.

    A run of the study's only set, with its own seed and algorithm, has the name of the study.
    """
    parts = [part for part in place.folder.relative_to(study).parts[:-1] if part != layout.SETS]
    if place.algorithm:
        parts.append(place.algorithm)
    return "/".join(parts) or study.resolve().name


def _read_file(file: Path) -> list[Curve]:
    if file.suffix.lower() == ".csv":
        return plain_curves.read_csv(file)
    document = checks.mapping(checks.json_of(file), str(file))
    return plain_curves.read_json(document, file) if "curves" in document else _exchange_curves(document, file)


# ---- run folders


class _Eval(NamedTuple):
    """An eval line of metrics.jsonl: EFLOPs from the switch point, score and standard error in percent."""

    eflops_rl: float
    score: float
    score_se: float | None


def read_run_folder(folder: Path) -> Curve:
    """Return the curve of an RL run from the eval lines of its metrics.jsonl. The line at eflops_rl = 0 gives P_sft."""
    file = folder / METRICS
    lines = [(where, row) for row, where in read_metrics(folder) if row["kind"] == "eval"]
    first, after = _split_at_switch_point([_eval(where, line) for where, line in lines], file)
    start = read_start(folder)
    errors = [point.score_se for point in after if point.score_se is not None]
    name = folder.resolve().name
    return Curve(
        dataset=folder.resolve().parent.name if name.startswith("rl-step-") else name,
        start_step=start["start_step"],
        eflops_sft=checks.number(lines[0][1], "eflops_sft", lines[0][0]),
        p_sft=first.score,
        eflops=checks.increasing([point.eflops_rl for point in after], f"{file}: eflops_rl of the eval lines"),
        scores=np.array([point.score for point in after]),
        p_sft_se=first.score_se,
        score_se=float(np.median(errors)) if errors else None,
    )


def _eval(where: str, line: Mapping[str, Any]) -> _Eval:
    return _Eval(
        checks.number(line, "eflops_rl", where),
        checks.percent(line, "score", where),
        checks.spread(line, "score_se", where),
    )


def _split_at_switch_point(points: Sequence[_Eval], file: Path) -> tuple[_Eval, list[_Eval]]:
    """Return the score at the switch point and those after it. A curve needs both."""
    first = next((point for point in points if point.eflops_rl == 0), None)
    after = [point for point in points if point.eflops_rl > 0]
    if first is None or not after:
        what = "at eflops_rl = 0, the switch point" if first is None else "with eflops_rl > 0"
        raise UserError(
            f"{file}: no `kind` = eval line {what}. "
            "Give the folder of an RL run that has been scored at its start and later."
        )
    return first, after


# ---- the exchange format


def _exchange_curves(document: Mapping[str, Any], file: Path) -> list[Curve]:
    meta = checks.mapping(checks.need(document, "meta", str(file)), f"{file}: meta")
    benchmarks = checks.mapping(checks.need(meta, "benchmarks", f"{file}: meta"), f"{file}: meta.benchmarks")
    counts = {name: checks.number(benchmarks, name, f"{file}: meta.benchmarks") for name in benchmarks}
    if not counts or min(counts.values()) <= 0 or max(counts.values()) > MAX_PROBLEMS:
        raise UserError(
            f"{file}: meta.benchmarks must give the number of problems, above 0 and at most 1e12, "
            "of one or more benchmarks"
        )
    top = checks.maximum(meta.get("max_score", checks.MAX_SCORE), f"{file}: meta.max_score")
    shape = QWEN2_5_7B
    if meta.get("model") is not None:
        where = f"{file}: meta.model"
        shape = model_shape(checks.mapping(meta["model"], where), where)
    datasets = checks.mapping(checks.need(document, "datasets", str(file)), f"{file}: datasets")
    curves = []
    for name, data in datasets.items():
        curves += _dataset_curves(name, data, counts, top, shape, f"{file}: datasets.{name}")
    if not curves:
        raise UserError(f"{file}: no RL curve in datasets.*.rl")
    return curves


def _dataset_curves(
    name: str, data: object, counts: dict[str, float], top: float, shape: ModelShape, where: str
) -> list[Curve]:
    data = checks.mapping(data, where)
    sft_x, sft_scores = _points(checks.need(data, "sft", where), counts, top, f"{where}.sft")
    curves: list[tuple[int, Curve]] = []
    for key, points in checks.mapping(checks.need(data, "rl", where), f"{where}.rl").items():
        if not key.isdecimal() or len(key) > MAX_DIGITS:
            raise UserError(f"{where}.rl: the key {key!r} must be the step of an SFT checkpoint, a whole number")
        step = int(key)
        x, scores = _points(points, counts, top, f"{where}.rl.{key}")
        entry = _sft_entry(step, data, sft_x, shape, where)
        curve = Curve(name, step, float(sft_x[entry]), float(sft_scores[entry]), x, scores, max_score=top)
        curves.append((step, curve))
    return [curve for _, curve in sorted(curves, key=lambda entry: entry[0])]


def _sft_entry(step: int, data: Mapping[str, Any], sft_x: np.ndarray, shape: ModelShape, where: str) -> int:
    """Return the index of the `sft` entry that has the score of the checkpoint at `step`."""
    steps = data.get("checkpoint_steps")
    if isinstance(steps, list) and len(steps) == len(sft_x) and step in steps:
        return steps.index(step)
    x = 0.0
    if step > 0:
        batch, length = checks.number(data, "batch_size", where), checks.number(data, "mean_seq_len", where)
        x = flops.paper_sft(shape, steps=step, batch=batch, mean_length=length) / flops.EFLOP
    nearest = int(np.argmin(np.abs(sft_x - x)))
    if abs(sft_x[nearest] - x) > NEAREST_SHARE * x + NEAREST_EFLOPS:
        raise UserError(
            f"{where}.sft: no entry near the checkpoint at step {step} ({x:.4g} EFLOPs; the nearest entry is at "
            f"{sft_x[nearest]:.4g}), so its P_sft is unknown. Check batch_size and mean_seq_len, give meta.model "
            "(fields "
            "of its config.json), or list checkpoint_steps, one per sft entry."
        )
    return nearest


def _points(points: object, counts: dict[str, float], top: float, where: str) -> tuple[np.ndarray, np.ndarray]:
    """Return the EFLOPs [n], increasing, and overall scores [n] of a list of measured points."""
    if not isinstance(points, list) or not points:
        raise UserError(
            f"{where}: must be a list of one or more points {{eflops, scores}}, found {type(points).__name__}"
        )
    x, scores = [], []
    problems = sum(counts.values())
    for i, entry in enumerate(points):
        place = f"{where}[{i}]"
        point = checks.mapping(entry, place)
        x.append(checks.number(point, "eflops", place))
        by_name = checks.mapping(checks.need(point, "scores", place), f"{place}.scores")
        overall = sum(n * checks.percent(by_name, name, f"{place}.scores") for name, n in counts.items()) / problems
        scores.append(checks.at_most(overall, top, f"{place}: the overall score"))
    return checks.increasing(x, f"{where}: eflops"), np.array(scores)
