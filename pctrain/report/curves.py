"""Score-against-compute curves of RL runs: the run folders of pctrain, plain files (plain_curves.py), and the exchange format (JSON).

The exchange format, one file for many curves:

    {"meta": {"benchmarks": {name: number of problems}, "model": {fields of a Hugging Face config.json; optional},
              "max_score": the highest overall score there can be, percent; optional},
     "datasets": {name: {"sft": [{"eflops": E, "scores": {benchmark: percent}}, ...],      # along SFT
                         "rl": {step: [{"eflops": E, "scores": {...}}, ...], ...},        # from the checkpoint at `step`; E from there
                         "checkpoint_steps": [...], "batch_size": n, "mean_seq_len": tokens}}}

A score is the mean over all problems: the benchmarks' means, weighted by their numbers of problems. The P_sft of a checkpoint is the
`sft` entry nearest to it in EFLOPs. Where `checkpoint_steps` and `sft` are equally long they are the same points; otherwise a
checkpoint's EFLOPs are the paper's SFT FLOPs of its step (`meta.model`, or Qwen2.5-7B, the model of the published curves).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

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

# A checkpoint without an `sft` entry within this share of its EFLOPs has no P_sft; files round EFLOPs to two decimals.
NEAREST_SHARE, NEAREST_EFLOPS = 0.10, 0.005
MAX_DIGITS = 12  # of a step
MAX_PROBLEMS = 1e12  # of a benchmark


def read_curves(path: Path | str) -> list[Curve]:
    """Curves of a file, of one RL run folder, or of all RL runs of a study (layout.py), by seed, set and step."""
    path = Path(path)
    if path.is_file():
        return _read_file(path)
    if not path.exists():
        raise UserError(f"{path}: no such file or folder; give a curves file (JSON or CSV) or a run folder")
    if has_metrics(path):
        return [read_run_folder(path)]
    places = [
        place for place in layout.find_runs(path) if place.kind == "rl" and has_metrics(place.folder)
    ]
    if not places:
        raise UserError(
            f"{path}: neither a run folder (metrics.jsonl) nor a study with RL runs (rl-step-N/metrics.jsonl)"
        )
    return [replace(read_run_folder(place.folder), dataset=_name(path, place)) for place in places]


def _name(study: Path, place: layout.Place) -> str:
    """What tells the runs of a study apart beside the step: seed, set and algorithm; of the plain one the study's name."""
    told = [part for part in place.folder.relative_to(study).parts[:-1] if part != layout.SETS]
    told += [place.algorithm] if place.algorithm else []
    return "/".join(told) or study.resolve().name


def _read_file(file: Path) -> list[Curve]:
    if file.suffix.lower() == ".csv":
        return plain_curves.read_csv(file)
    document = checks.mapping(checks.json_of(file), str(file))
    return plain_curves.read_json(document, file) if "curves" in document else _exchange_curves(document, file)


# ---- run folders


def read_run_folder(folder: Path) -> Curve:
    """Curve from the `kind` = eval lines of an RL run's metrics.jsonl; its line at eflops_rl 0 is the score at the joint, P_sft."""
    file = folder / METRICS
    lines = [(where, row) for row, where in read_metrics(folder) if row["kind"] == "eval"]
    points = [
        (
            checks.number(line, "eflops_rl", where),
            checks.percent(line, "score", where),
            checks.spread(line, "score_se", where),
        )
        for where, line in lines
    ]
    joint = next((p for p in points if p[0] == 0), None)
    after = [p for p in points if p[0] > 0]
    if joint is None or not after:
        what = "at eflops_rl = 0, the joint" if joint is None else "with eflops_rl > 0"
        raise UserError(
            f"{file}: no `kind` = eval line {what}; give the folder of an RL run that has been scored at its start and later"
        )
    start = read_start(folder)
    errors = [p[2] for p in after if p[2] is not None]
    return Curve(
        dataset=folder.resolve().parent.name if folder.resolve().name.startswith("rl-step-") else folder.resolve().name,
        start_step=start["start_step"],
        eflops_sft=checks.number(lines[0][1], "eflops_sft", lines[0][0]),
        p_sft=joint[1],
        eflops=checks.increasing([p[0] for p in after], f"{file}: eflops_rl of the eval lines"),
        scores=np.array([p[1] for p in after]),
        p_sft_se=joint[2],
        score_se=float(np.median(errors)) if errors else None,
    )


# ---- the exchange format


def _exchange_curves(document: dict, file: Path) -> list[Curve]:
    meta = checks.mapping(checks.need(document, "meta", str(file)), f"{file}: meta")
    benchmarks = checks.mapping(checks.need(meta, "benchmarks", f"{file}: meta"), f"{file}: meta.benchmarks")
    counts = {name: checks.number(benchmarks, name, f"{file}: meta.benchmarks") for name in benchmarks}
    if not counts or min(counts.values()) <= 0 or max(counts.values()) > MAX_PROBLEMS:
        raise UserError(
            f"{file}: meta.benchmarks must give a number of problems above 0 (at most 1e12) for each of one or more benchmarks"
        )
    top = checks.maximum(meta.get("max_score", checks.MAX_SCORE), f"{file}: meta.max_score")
    shape = QWEN2_5_7B
    if meta.get("model") is not None:
        where = f"{file}: meta.model"
        shape = model_shape(checks.mapping(meta["model"], where), where)
    datasets = checks.mapping(checks.need(document, "datasets", str(file)), f"{file}: datasets")
    curves = [
        c
        for name, data in datasets.items()
        for c in _dataset_curves(name, data, counts, top, shape, f"{file}: datasets.{name}")
    ]
    if not curves:
        raise UserError(f"{file}: no RL curve below datasets.*.rl")
    return curves


def _dataset_curves(
    name: str, data: object, counts: dict[str, float], top: float, shape: ModelShape, where: str
) -> list[Curve]:
    data = checks.mapping(data, where)
    sft_x, sft_scores = _points(checks.need(data, "sft", where), counts, top, f"{where}.sft")
    curves = []
    for key, points in checks.mapping(checks.need(data, "rl", where), f"{where}.rl").items():
        if not key.isdecimal() or len(key) > MAX_DIGITS:
            raise UserError(f"{where}.rl: the key {key!r} must be the step of an SFT checkpoint, a whole number")
        x, scores = _points(points, counts, top, f"{where}.rl.{key}")
        entry = _sft_entry(int(key), data, sft_x, shape, where)
        curves.append(Curve(name, int(key), float(sft_x[entry]), float(sft_scores[entry]), x, scores, max_score=top))
    return sorted(curves, key=lambda curve: curve.start_step)


def _sft_entry(step: int, data: Mapping, sft_x: np.ndarray, shape: ModelShape, where: str) -> int:
    """Index of the `sft` entry that holds the score of the checkpoint at `step`."""
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
            f"{where}.sft: no entry near the checkpoint at step {step} ({x:.4g} EFLOPs; the nearest is at {sft_x[nearest]:.4g}), so its "
            "P_sft is unknown; check batch_size and mean_seq_len, give meta.model (fields of its config.json), or list checkpoint_steps "
            "one per sft entry"
        )
    return nearest


def _points(points: object, counts: dict[str, float], top: float, where: str) -> tuple[np.ndarray, np.ndarray]:
    """EFLOPs [n], increasing, and overall scores [n] of a list of measured points."""
    if not isinstance(points, list) or not points:
        raise UserError(
            f"{where}: must be a list of one or more points {{eflops, scores}}, found {type(points).__name__}"
        )
    x, scores = [], []
    for i, point in enumerate(points):
        here = f"{where}[{i}]"
        point = checks.mapping(point, here)
        x.append(checks.number(point, "eflops", here))
        by_name = checks.mapping(checks.need(point, "scores", here), f"{here}.scores")
        overall = sum(n * checks.percent(by_name, name, f"{here}.scores") for name, n in counts.items()) / sum(
            counts.values()
        )
        scores.append(checks.at_most(overall, top, f"{here}: the overall score"))
    return checks.increasing(x, f"{where}: eflops"), np.array(scores)
