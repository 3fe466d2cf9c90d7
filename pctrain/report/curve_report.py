"""Read a file of score curves (curves.py) as a `Study`, so that its report is made like that of a study's folders.

The file states no standard errors, so those of the scores are binomial, from its numbers of problems; fits get none. A
set may give its validation losses, `val_loss` (nats per token) in entries of `sft`: regimes and the chart of ceilings
against losses are made from them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pctrain.ceiling import checks, regimes
from pctrain.ceiling.curve import Curve
from pctrain.ceiling.fit import fit_curve
from pctrain.ceiling.stats import Measured
from pctrain.common.errors import UserError
from pctrain.common.progress import track
from pctrain.compute import flops
from pctrain.compute.model_shape import QWEN2_5_7B, ModelShape
from pctrain.config.tree import CeilingConfig
from pctrain.hf.config import model_shape
from pctrain.report import curves
from pctrain.report.study_data import FittedRun, RLPoint, RLRun, SFTLoss, SFTRun, SFTScore, Study

NEAR_CHECKPOINT = 0.02  # share of the steps by which the compute of an `sft` entry may miss that of a listed checkpoint


def read(file: Path) -> Study:
    """Read the file. The UserError names the place in it that is missing or malformed."""
    all_curves = curves.read_curves(file)
    document = {} if file.suffix.lower() == ".csv" else checks.mapping(checks.json_of(file), str(file))
    progress = track(all_curves, "fits", total=len(all_curves), unit="curve")
    if "meta" not in document:  # only curves, without benchmarks or SFT
        return Study(file.stem, file.parent, [], [_plain_run(file, curve) for curve in progress])
    problems = document["meta"]["benchmarks"]
    model = document["meta"].get("model")
    shape = QWEN2_5_7B if model is None else model_shape(model, f"{file}: meta.model")
    sft = {name: _sft_run(file, name, data, shape, problems) for name, data in document["datasets"].items()}
    rl: list[RLRun] = []
    without_sft: set[bytes] = set()
    for curve in progress:
        if curve.start_step == 0:  # belongs to no set; a file that repeats it for every set has it once in the report
            if curve.scores.tobytes() in without_sft:
                continue
            without_sft.add(curve.scores.tobytes())
        entries = document["datasets"][curve.dataset]["rl"][str(curve.start_step)]
        rl.append(_rl_run(file, curve, entries, sft[curve.dataset], problems))
    return Study(file.stem, file.parent, list(sft.values()), rl)


def _plain_run(file: Path, curve: Curve) -> RLRun:
    """Return the run of a curve without SFT. A standard error that the file does not state is the noise of the fit."""
    fit = fit_curve(curve)
    first_se = curve.p_sft_se or fit.sigma
    score_se = curve.score_se or fit.sigma
    points = [RLPoint(0, 0.0, curve.p_sft, first_se)]
    for i, (x, y) in enumerate(zip(curve.eflops, curve.scores, strict=True), 1):
        points.append(RLPoint(i, float(x), float(y), score_se))
    return FittedRun(
        curve.dataset,
        file,
        {},
        "",
        {},
        set=curve.dataset,
        varies=frozenset({"set"}),
        algorithm="RL",
        points=points,
        p_sft=Measured(curve.p_sft, first_se),
        fit=fit,
    )


def _sft_run(
    file: Path, name: str, data: Mapping[str, Any], shape: ModelShape, problems: Mapping[str, float]
) -> SFTRun:
    config = CeilingConfig()
    steps = _steps(data, shape)
    scores = [
        SFTScore(step, entry["eflops"], *_score(entry["scores"], problems), _benchmarks(entry["scores"], problems))
        for step, entry in zip(steps, data["sft"], strict=True)
    ]
    return SFTRun(
        f"{name}/sft",
        file,
        {},
        "",
        {},
        set=name,
        varies=frozenset({"set"}),
        losses=_losses(data["sft"], steps, config, f"{file}: datasets.{name}.sft"),
        scores=scores,
        delta=config.delta,
        delta2=config.delta2,
    )


def _losses(
    entries: Sequence[Mapping[str, Any]], steps: Sequence[int], config: CeilingConfig, where: str
) -> list[SFTLoss]:
    """Return the validation losses that the entries of `sft` give, with their regimes."""
    validations: list[tuple[int, float, float]] = []
    for i, (step, entry) in enumerate(zip(steps, entries, strict=True)):
        loss = _loss(entry, f"{where}[{i}]")
        if loss is not None:
            validations.append((step, entry["eflops"], loss))
    if not validations:
        return []
    labels = regimes.classify([x for _, x, _ in validations], [y for *_, y in validations], config.delta, config.delta2)
    return [SFTLoss(step, x, y, 0.0, label) for (step, x, y), label in zip(validations, labels, strict=True)]


def _steps(data: Mapping[str, Any], shape: ModelShape) -> list[int]:
    """Return the steps of the `sft` entries.

    They are listed, or follow from the entries' compute: a listed checkpoint within NEAR_CHECKPOINT is that checkpoint.
    A file that states neither gets the numbers of its entries.
    """
    listed, entries = data.get("checkpoint_steps"), data["sft"]
    if isinstance(listed, list) and len(listed) == len(entries):
        return [int(step) for step in listed]
    if "batch_size" not in data or "mean_seq_len" not in data:
        return list(range(len(entries)))
    per_step = flops.paper_sft(shape, steps=1, batch=data["batch_size"], mean_length=data["mean_seq_len"]) / flops.EFLOP
    steps = []
    for entry in entries:
        step = entry["eflops"] / per_step
        nearest = min(listed or [step], key=lambda other: abs(other - step))
        steps.append(round(nearest if abs(nearest - step) <= NEAR_CHECKPOINT * step else step))
    return steps


def _rl_run(
    file: Path, curve: Curve, entries: Sequence[Mapping[str, Any]], sft: SFTRun, problems: Mapping[str, float]
) -> RLRun:
    if curve.start_step is None or curve.eflops_sft is None:
        raise ValueError("a curve of the exchange format has a start step and the EFLOPs of SFT")
    eflops_sft = curve.eflops_sft
    start = min(sft.scores, key=lambda p: abs(p.eflops_sft - eflops_sft))
    points = [RLPoint(0, 0.0, curve.p_sft, start.score_se, start.benchmarks)]
    for i, entry in enumerate(entries, 1):
        score, score_se = _score(entry["scores"], problems)
        points.append(RLPoint(i, entry["eflops"], score, score_se, _benchmarks(entry["scores"], problems)))
    regime_at = {p.eflops_sft: p.regime for p in sft.losses}
    return FittedRun(
        f"{curve.dataset}/rl-step-{curve.start_step}",
        file,
        {},
        "",
        {},
        set=curve.dataset if curve.start_step else "",
        varies=frozenset({"set"}),
        start_step=curve.start_step,
        algorithm="RL",
        eflops_sft=eflops_sft,
        points=points,
        start_regime=regime_at.get(start.eflops_sft) if curve.start_step else None,
        p_sft=Measured(curve.p_sft, start.score_se),
        fit=fit_curve(curve),
        sft_equal=sft.score_at(eflops_sft + points[-1].eflops_rl),
    )


def _score(scores: Mapping[str, float], problems: Mapping[str, float]) -> tuple[float, float]:
    """Return the mean over all problems and its binomial standard error, percent."""
    n = sum(problems.values())
    mean = sum(count * scores[name] for name, count in problems.items()) / n
    variance = sum(count * scores[name] * (100 - scores[name]) for name, count in problems.items())
    return mean, math.sqrt(variance) / n


def _benchmarks(scores: Mapping[str, float], problems: Mapping[str, float]) -> dict[str, float]:
    return {name: float(scores[name]) for name in problems}


def _loss(entry: Mapping[str, Any], where: str) -> float | None:
    value = entry.get("val_loss")
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
        raise UserError(f"{where}: `val_loss` must be a finite number above 0 (nats per token), found {value!r:.60}")
    return float(value)
