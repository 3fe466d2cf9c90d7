"""Score-against-compute curves of RL runs: the exchange format (JSON), and the run folders of pctrain.

The exchange format, one file for many curves:

    {"meta": {"benchmarks": {name: number of problems}, "model": {fields of a Hugging Face config.json; optional}},
     "datasets": {name: {"sft": [{"eflops": E, "scores": {benchmark: percent}}, ...],      # along SFT
                         "rl": {step: [{"eflops": E, "scores": {...}}, ...], ...},        # from the checkpoint at `step`; E from there
                         "checkpoint_steps": [...], "batch_size": n, "mean_seq_len": tokens}}}

A score is the mean over all problems: the benchmarks' means, weighted by their numbers of problems. The P_sft of a checkpoint is the
`sft` entry nearest to it in EFLOPs. Where `checkpoint_steps` and `sft` are equally long they are the same points; otherwise a
checkpoint's EFLOPs are the paper's SFT FLOPs of its step (`meta.model`, or Qwen2.5-7B, the model of the published curves).
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pctrain.ceiling import flops
from pctrain.errors import UserError

# A checkpoint without an `sft` entry within this share of its EFLOPs has no P_sft; files round EFLOPs to two decimals.
NEAREST_SHARE, NEAREST_EFLOPS = 0.10, 0.005


@dataclass(frozen=True)
class Curve:
    """One RL run: scores in percent against EFLOPs from the SFT/RL joint, both float64 [n], the joint itself excluded."""

    dataset: str
    start_step: int
    eflops_sft: float
    p_sft: float
    eflops: np.ndarray
    scores: np.ndarray
    p_sft_se: float | None = None  # standard error of p_sft, points; None: not stated
    score_se: float | None = None  # typical standard error of one score, points; None: not stated

    @property
    def name(self) -> str:
        return f"{self.dataset}, step {self.start_step}"


def read_curves(path: Path | str) -> list[Curve]:
    """Curves of an exchange file, of one RL run folder, or of all RL run folders of a study (`rl-step-N/` in it), by data set and step."""
    path = Path(path)
    if path.is_file():
        return read_exchange_file(path)
    if not path.exists():
        raise UserError(f"{path}: no such file or folder; give a curves file (JSON) or a run folder")
    if (path / "metrics.jsonl").is_file():
        return [read_run_folder(path)]
    folders = [folder for folder in path.glob("rl-step-*") if (folder / "metrics.jsonl").is_file()]
    if not folders:
        raise UserError(f"{path}: neither a run folder (metrics.jsonl) nor a study with RL runs (rl-step-N/metrics.jsonl)")
    return sorted((read_run_folder(folder) for folder in folders), key=lambda curve: curve.start_step)


# ---- run folders


def read_run_folder(folder: Path) -> Curve:
    """Curve from the `kind` = eval lines of an RL run's metrics.jsonl; its line at eflops_rl 0 is the score at the joint, P_sft."""
    file = folder / "metrics.jsonl"
    lines = [line for line in _json_lines(file) if line[1].get("kind") == "eval"]
    points = [(_number(line, "eflops_rl", where), _percent(line, "score", where), _standard_error(line, where)) for where, line in lines]
    joint = next((p for p in points if p[0] == 0), None)
    after = [p for p in points if p[0] > 0]
    if joint is None or not after:
        what = "at eflops_rl = 0, the joint" if joint is None else "with eflops_rl > 0"
        raise UserError(f"{file}: no `kind` = eval line {what}; give the folder of an RL run that has been scored at its start and later")
    start = _start(folder)
    errors = [p[2] for p in after if p[2] is not None]
    return Curve(
        dataset=folder.resolve().parent.name if folder.resolve().name.startswith("rl-step-") else folder.resolve().name,
        start_step=start["start_step"],
        eflops_sft=_number(lines[0][1], "eflops_sft", lines[0][0]),
        p_sft=joint[1],
        eflops=_increasing([p[0] for p in after], f"{file}: eflops_rl of the eval lines"),
        scores=np.array([p[1] for p in after]),
        p_sft_se=joint[2],
        score_se=float(np.median(errors)) if errors else None,
    )


def _start(folder: Path) -> dict:
    file = folder / "start.json"
    if not file.is_file():
        raise UserError(f"{file}: missing; give the folder of an RL run (start.json says which SFT checkpoint it began from)")
    start = _object(_json(file), str(file))
    if isinstance(start.get("start_step"), bool) or not isinstance(start.get("start_step"), int):
        raise UserError(f"{file}: `start_step` must be a whole number, found {start.get('start_step')!r}")
    return start


def _json_lines(file: Path) -> list[tuple[str, dict]]:
    records = []
    for number, line in enumerate(_text(file).splitlines(), start=1):
        where = f"{file}, line {number}"
        try:
            records.append((where, _object(json.loads(line), where)))
        except json.JSONDecodeError as error:
            raise UserError(f"{where}: not JSON ({error}); a line is one object") from None
    return records


def _standard_error(record: Mapping, where: str) -> float | None:
    """`score_se` in points. 0 (all or no problems solved) says nothing about the noise elsewhere, so it counts as not stated."""
    return (_number(record, "score_se", where) or None) if record.get("score_se") is not None else None


# ---- the exchange format


def read_exchange_file(file: Path) -> list[Curve]:
    document = _object(_json(file), str(file))
    meta = _object(_need(document, "meta", str(file)), f"{file}: meta")
    benchmarks = _object(_need(meta, "benchmarks", f"{file}: meta"), f"{file}: meta.benchmarks")
    counts = {name: _number(benchmarks, name, f"{file}: meta.benchmarks") for name in benchmarks}
    if not counts or min(counts.values()) <= 0:
        raise UserError(f"{file}: meta.benchmarks must give a number of problems above 0 for each of one or more benchmarks")
    shape = flops.QWEN2_5_7B
    if meta.get("model") is not None:
        where = f"{file}: meta.model"
        shape = flops.ModelShape.from_hf_config(_object(meta["model"], where), where)
    datasets = _object(_need(document, "datasets", str(file)), f"{file}: datasets")
    curves = [c for name, data in datasets.items() for c in _dataset_curves(name, data, counts, shape, f"{file}: datasets.{name}")]
    if not curves:
        raise UserError(f"{file}: no RL curve below datasets.*.rl")
    return curves


def _dataset_curves(name: str, data: object, counts: dict[str, float], shape: flops.ModelShape, where: str) -> list[Curve]:
    data = _object(data, where)
    sft_x, sft_scores = _points(_need(data, "sft", where), counts, f"{where}.sft")
    curves = []
    for key, points in _object(_need(data, "rl", where), f"{where}.rl").items():
        if not key.isdecimal():
            raise UserError(f"{where}.rl: the key {key!r} must be the step of an SFT checkpoint, a whole number")
        x, scores = _points(points, counts, f"{where}.rl.{key}")
        entry = _sft_entry(int(key), data, sft_x, shape, where)
        curves.append(Curve(name, int(key), float(sft_x[entry]), float(sft_scores[entry]), x, scores))
    return sorted(curves, key=lambda curve: curve.start_step)


def _sft_entry(step: int, data: Mapping, sft_x: np.ndarray, shape: flops.ModelShape, where: str) -> int:
    """Index of the `sft` entry that holds the score of the checkpoint at `step`."""
    steps = data.get("checkpoint_steps")
    if isinstance(steps, list) and len(steps) == len(sft_x) and step in steps:
        return steps.index(step)
    x = 0.0
    if step > 0:
        batch, length = _number(data, "batch_size", where), _number(data, "mean_seq_len", where)
        x = flops.paper_sft(shape, steps=step, batch=batch, mean_length=length) / flops.EFLOP
    nearest = int(np.argmin(np.abs(sft_x - x)))
    if abs(sft_x[nearest] - x) > NEAREST_SHARE * x + NEAREST_EFLOPS:
        raise UserError(
            f"{where}.sft: no entry near the checkpoint at step {step} ({x:.4g} EFLOPs; the nearest is at {sft_x[nearest]:.4g}), so its "
            "P_sft is unknown; check batch_size and mean_seq_len, give meta.model (fields of its config.json), or list checkpoint_steps "
            "one per sft entry")
    return nearest


def _points(points: object, counts: dict[str, float], where: str) -> tuple[np.ndarray, np.ndarray]:
    """EFLOPs [n], increasing, and overall scores [n] of a list of measured points."""
    if not isinstance(points, list) or not points:
        raise UserError(f"{where}: must be a list of one or more points {{eflops, scores}}, found {type(points).__name__}")
    x, scores = [], []
    for i, point in enumerate(points):
        here = f"{where}[{i}]"
        point = _object(point, here)
        x.append(_number(point, "eflops", here))
        by_name = _object(_need(point, "scores", here), f"{here}.scores")
        scores.append(sum(n * _percent(by_name, name, f"{here}.scores") for name, n in counts.items()) / sum(counts.values()))
    return _increasing(x, f"{where}: eflops"), np.array(scores)


# ---- checked reading


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{file}: cannot be read as text ({error})") from None


def _json(file: Path) -> object:
    try:
        return json.loads(_text(file))
    except json.JSONDecodeError as error:
        raise UserError(f"{file}, line {error.lineno}, column {error.colno}: not JSON ({error.msg})") from None


def _object(value: object, where: str) -> dict:
    if not isinstance(value, dict):
        raise UserError(f"{where}: must be a JSON object, found {type(value).__name__}")
    return value


def _need(mapping: Mapping, key: str, where: str) -> object:
    if key not in mapping:
        raise UserError(f"{where}: the key `{key}` is missing; keys found: {', '.join(map(str, mapping)) or 'none'}")
    return mapping[key]


def _number(mapping: Mapping, key: str, where: str) -> float:
    value = _need(mapping, key, where)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value) or value < 0:
        raise UserError(f"{where}: `{key}` must be a finite number, 0 or more, found {value!r}")
    return float(value)


def _percent(mapping: Mapping, key: str, where: str) -> float:
    value = _number(mapping, key, where)
    if value > 100:
        raise UserError(f"{where}: `{key}` must be a score in percent, at most 100, found {value!r}")
    return value


def _increasing(values: list[float], where: str) -> np.ndarray:
    x = np.array(values, dtype=np.float64)
    falls = np.flatnonzero(np.diff(x) <= 0)
    if len(falls):
        raise UserError(f"{where} must increase from point to point: {x[falls[0] + 1]:g} follows {x[falls[0]]:g}")
    return x
