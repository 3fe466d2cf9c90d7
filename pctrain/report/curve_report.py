"""A file of score curves (curves.py) as a `Study`, so that its report is made like that of a study's folders.

Standard errors are binomial, from the file's numbers of problems; the file itself states none, and fits are told none. A set may give its
validation losses: `val_loss` (nats per token) in entries of `sft`, of which regimes and the chart of ceilings against losses are made.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from pctrain.ceiling import regimes
from pctrain.ceiling.curve import Curve
from pctrain.ceiling.fit import fit_curve
from pctrain.common.errors import UserError
from pctrain.common.progress import track
from pctrain.compute import flops
from pctrain.compute.model_shape import QWEN2_5_7B, ModelShape
from pctrain.config.tree import CeilingConfig
from pctrain.hf.config import model_shape
from pctrain.report import curves
from pctrain.report.study_data import Estimate, RLPoint, RLRun, SFTPoint, SFTRun, Study


def read(file: Path) -> Study:
    """UserError names the place in the file that is missing or malformed."""
    found = curves.read_curves(file)
    document = {} if file.suffix.lower() == ".csv" else json.loads(file.read_text(encoding="utf-8"))
    if "meta" not in document:  # curves alone, without benchmarks or SFT
        return Study(
            file.stem,
            file.parent,
            [],
            [_plain(file, curve) for curve in track(found, "fits", total=len(found), unit="curve")],
        )
    problems = document["meta"]["benchmarks"]
    model = document["meta"].get("model")
    shape = QWEN2_5_7B if model is None else model_shape(model, f"{file}: meta.model")
    sft = [_sft(file, name, entries, shape, problems) for name, entries in document["datasets"].items()]
    named = {run.set: run for run in sft}
    rl, pure = [], set()
    for curve in track(found, "fits", total=len(found), unit="curve"):
        if curve.start_step == 0:  # RL without SFT is of no set; a file that gives it with every set has it once here
            if curve.scores.tobytes() in pure:
                continue
            pure.add(curve.scores.tobytes())
        rl.append(
            _rl(
                file,
                curve,
                document["datasets"][curve.dataset]["rl"][str(curve.start_step)],
                named[curve.dataset],
                problems,
            )
        )
    return Study(file.stem, file.parent, sft, rl)


def _plain(file: Path, curve: Curve) -> RLRun:
    """Where the file states no standard error, the noise that the fit found stands for it."""
    fit = fit_curve(curve)
    joint_se, score_se = curve.p_sft_se or fit.sigma, curve.score_se or fit.sigma
    points = [RLPoint(0, 0.0, curve.p_sft, joint_se)]
    points += [
        RLPoint(i, float(x), float(y), score_se)
        for i, (x, y) in enumerate(zip(curve.eflops, curve.scores, strict=True), 1)
    ]
    return RLRun(
        curve.dataset,
        file,
        {},
        "",
        {},
        set=curve.dataset,
        varies=frozenset({"set"}),
        algorithm="RL",
        points=points,
        p_sft=Estimate(curve.p_sft, joint_se),
        fit=fit,
    )


def _sft(file: Path, name: str, data: dict[str, Any], shape: ModelShape, problems: dict[str, float]) -> SFTRun:
    steps = _steps(data, shape)
    losses = [_loss(entry, f"{file}: datasets.{name}.sft[{i}]") for i, entry in enumerate(data["sft"])]
    deltas = CeilingConfig()
    told = [i for i, loss in enumerate(losses) if loss is not None]
    x, known = [data["sft"][i]["eflops"] for i in told], [losses[i] for i in told]
    regime = dict(zip(told, regimes.classify(x, known, deltas.delta, deltas.delta2), strict=True)) if told else {}
    points = [
        SFTPoint(
            int(step),
            entry["eflops"],
            losses[i],
            0.0 if losses[i] is not None else None,
            *_score(entry["scores"], problems),
            regime.get(i),
            _benchmarks(entry["scores"], problems),
        )
        for i, (step, entry) in enumerate(zip(steps, data["sft"], strict=True))
    ]
    return SFTRun(
        f"{name}/sft",
        file,
        {},
        "",
        {},
        set=name,
        varies=frozenset({"set"}),
        points=points,
        delta=deltas.delta,
        delta2=deltas.delta2,
    )


def _steps(data: dict[str, Any], shape: ModelShape) -> list[int]:
    """Steps of the `sft` entries: as listed; or by their compute, that of a checkpoint within 2 %; by number where nothing is known."""
    listed, entries = data.get("checkpoint_steps"), data["sft"]
    if isinstance(listed, list) and len(listed) == len(entries):
        return [int(step) for step in listed]
    if "batch_size" not in data or "mean_seq_len" not in data:
        return list(range(len(entries)))
    one = flops.paper_sft(shape, steps=1, batch=data["batch_size"], mean_length=data["mean_seq_len"]) / flops.EFLOP
    steps = [entry["eflops"] / one for entry in entries]
    near = [min(listed or [step], key=lambda other: abs(other - step)) for step in steps]
    return [round(other if abs(other - step) <= 0.02 * step else step) for step, other in zip(steps, near, strict=True)]


def _rl(file: Path, curve: Curve, entries: list[dict[str, Any]], sft: SFTRun, problems: dict[str, float]) -> RLRun:
    joint = min(sft.points, key=lambda p: abs(p.eflops_sft - curve.eflops_sft))
    points = [RLPoint(0, 0.0, curve.p_sft, joint.score_se, joint.benchmarks)]
    points += [
        RLPoint(i, entry["eflops"], *_score(entry["scores"], problems), _benchmarks(entry["scores"], problems))
        for i, entry in enumerate(entries, 1)
    ]
    total = curve.eflops_sft + points[-1].eflops_rl
    return RLRun(
        f"{curve.dataset}/rl-step-{curve.start_step}",
        file,
        {},
        "",
        {},
        set=curve.dataset if curve.start_step else "",
        varies=frozenset({"set"}),
        start_step=curve.start_step,
        algorithm="RL",
        eflops_sft=curve.eflops_sft,
        points=points,
        start_regime=joint.regime if curve.start_step else None,
        p_sft=Estimate(curve.p_sft, joint.score_se),
        fit=fit_curve(curve),
        sft_equal=sft.score_at(total),
    )


def _score(scores: dict[str, float], problems: dict[str, float]) -> tuple[float, float]:
    """Mean over all problems and its binomial standard error, percent."""
    n = sum(problems.values())
    mean = sum(count * scores[name] for name, count in problems.items()) / n
    return mean, math.sqrt(sum(count * scores[name] * (100 - scores[name]) for name, count in problems.items())) / n


def _benchmarks(scores: dict[str, float], problems: dict[str, float]) -> dict[str, float]:
    return {name: float(scores[name]) for name in problems}


def _loss(entry: dict[str, Any], where: str) -> float | None:
    value = entry.get("val_loss")
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
        raise UserError(f"{where}: `val_loss` must be a finite number above 0 (nats per token), found {value!r}")
    return float(value)
