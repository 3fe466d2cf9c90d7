"""Read a study or a single run from its folders. Only the files are needed (docs/reference/run_folder.md)."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from pctrain.ceiling import checks, regimes
from pctrain.ceiling.fit import Fit, fit_ceiling, fit_curve
from pctrain.common.errors import UserError
from pctrain.report import curves
from pctrain.report.study_data import (
    LEDGER_KEYS,
    Measurement,
    NotMeasured,
    RLPoint,
    RLRun,
    Run,
    SFTLoss,
    SFTRun,
    SFTScore,
    Study,
    scored_run,
    sft_of,
    sum_ledgers,
    typical_se,
)
from pctrain.run import config_file
from pctrain.run.config_file import has_config
from pctrain.run.documents import is_finished, read_start, read_summary
from pctrain.run.layout import find_runs
from pctrain.run.names import CONFIG, METRICS, SUMMARY
from pctrain.run.records import has_ledger, has_metrics, read_metrics, read_rollouts, rollout_files
from pctrain.run.records import read_ledger as read_ledger_lines

NO_FIRST_SCORE = "the checkpoint was not scored before RL"
NO_SFT_RUN = "there is no SFT run in this folder"
SAMPLES = 6  # rollouts of a run that the report shows

AnyRun = TypeVar("AnyRun", bound=Run)


def read_study(folder: Path) -> Study:
    """Read a study folder (run/layout.py) or one run folder. The UserError names what is missing or malformed."""
    if not folder.is_dir():
        raise UserError(
            f"{folder}: no such folder. Give a study folder (with sft/ and rl-step-N/) or a single run folder."
        )
    places = find_runs(folder)
    if places:
        recorded = [place for place in places if _has_recorded(place.folder)]
        if not recorded:
            raise UserError(
                f"{folder}: its runs have only just begun and have recorded nothing yet. Try again in a moment."
            )
        just_begun = tuple(place.folder.relative_to(folder).as_posix() for place in places if place not in recorded)
        sft = [read_sft(place.folder, place.set) for place in recorded if place.kind == "sft"]
        rl = [read_rl(place.folder, sft, place.set) for place in recorded if place.kind == "rl"]
        return _name_runs(folder, sft, rl, just_begun)
    name = folder.resolve().name
    if has_metrics(folder) or has_config(folder):
        if read_config(folder)[0]["kind"] == "rl":
            return Study(name, folder, [], [read_rl(folder, [])])
        return Study(name, folder, [read_sft(folder)], [])
    raise UserError(
        f"{folder}: no runs here. Expected sft/ or rl-step-N/ in it (a study), or metrics.jsonl (a run). "
        "`pctrain run` writes a study; `pctrain sft` and `pctrain rl` write a run."
    )


def _has_recorded(run: Path) -> bool:
    """Return True if the run has made a step. From then on a missing file has been lost, not delayed."""
    if has_ledger(run):
        return True
    return has_metrics(run) and any(row["step"] > 0 for row, _ in _metrics(run))


def _name_runs(folder: Path, sft: Sequence[SFTRun], rl: Sequence[RLRun], just_begun: tuple[str, ...]) -> Study:
    """Return the study whose runs have names relative to its folder and know what differs among them."""
    values: dict[str, list[object]] = {
        "set": [run.set for run in sft],
        "seed": [run.seed for run in (*sft, *rl)],
        "algorithm": [run.algorithm for run in rl],
    }
    varies = frozenset(key for key, of_runs in values.items() if len(set(of_runs)) > 1)

    def named(run: AnyRun) -> AnyRun:
        return replace(run, name=run.folder.relative_to(folder).as_posix(), varies=varies)

    return Study(folder.resolve().name, folder, [named(run) for run in sft], [named(run) for run in rl], just_begun)


# -- SFT ---------------------------------------------------------------------------------------------------------------


def read_sft(folder: Path, set_name: str = "") -> SFTRun:
    """Read an SFT run folder."""
    config, text = read_config(folder)
    delta, delta2 = (_number_setting(folder, config, "ceiling", key) for key in ("delta", "delta2"))
    seed = int(_number_setting(folder, config, "run", "seed"))
    rows = [(row, where) for row, where in _metrics(folder) if row["kind"] != "train"]
    validations = [(row, where) for row, where in rows if row["kind"] == "val"]
    finite = [(row, where) for row, where in validations if not _is_not_finite(row)]
    return SFTRun(
        folder.name,
        folder,
        config,
        text,
        read_ledger(folder),
        set=set_name,
        seed=seed,
        losses=_sft_losses(folder, finite, delta, delta2),
        scores=_sft_scores([(row, where) for row, where in rows if row["kind"] == "eval"]),
        delta=delta,
        delta2=delta2,
        not_finite=len(validations) - len(finite),
        size=_trajectories(folder),
        difficulty=_difficulty(folder, config),
    )


def _is_not_finite(row: dict[str, Any]) -> bool:
    """Return True for a validation whose loss was nan or infinite: a run folder has null for it."""
    return row.get("val_loss", 0) is None


def _sft_losses(folder: Path, rows: Sequence[tuple[dict[str, Any], str]], delta: float, delta2: float) -> list[SFTLoss]:
    """Return the validations by step with their regimes; the last line of a step counts."""
    losses = {
        row["step"]: (row["eflops_sft"], _number(row, "val_loss", where), _number(row, "val_loss_se", where))
        for row, where in rows
    }
    if not losses:
        return []
    ordered = sorted(losses.items())
    eflops, values = ([loss[at] for _, loss in ordered] for at in (0, 1))
    try:
        labels = regimes.classify(eflops, values, delta, delta2)
    except UserError as error:
        raise UserError(f"{folder / METRICS}: {error}") from None
    return [SFTLoss(step, *loss, str(label)) for (step, loss), label in zip(ordered, labels, strict=True)]


def _sft_scores(rows: Sequence[tuple[dict[str, Any], str]]) -> list[SFTScore]:
    """Return the scores by step; the last line of a step counts."""
    scores = {
        row["step"]: SFTScore(
            row["step"],
            row["eflops_sft"],
            _number(row, "score", where),
            _number(row, "score_se", where),
            _benchmarks(row, where),
        )
        for row, where in rows
    }
    return [scores[step] for step in sorted(scores)]


def _trajectories(folder: Path) -> int | None:
    """Return the size of the training set from the summary of a finished run."""
    if not is_finished(folder):
        return None
    summary = read_summary(folder)["summary"]
    trajectories = summary.get("trajectories")
    if trajectories is not None and (isinstance(trajectories, bool) or not isinstance(trajectories, int)):
        raise UserError(f"{folder / SUMMARY}: `trajectories` must be a whole number, found {trajectories!r:.60}")
    return trajectories


def _difficulty(folder: Path, config: dict[str, Any]) -> str | None:
    """Return what `pctrain data select --take` recorded for the files of the set, if it is the same for all of them."""
    try:
        sources = (config.get("data") or {}).get("train") or []
        manifests = [Path(f"{source['path']}.manifest.json") for source in sources]
    except (TypeError, KeyError, AttributeError):
        raise UserError(f"{folder / CONFIG}: `data.train` must be a list of sources, each with its `path`") from None
    taken = {_taken(path) if path.is_file() else None for path in manifests}
    return taken.pop() if len(taken) == 1 else None


def _taken(manifest: Path) -> str | None:
    document = checks.mapping(checks.json_of(manifest), str(manifest))
    options = checks.mapping(document.get("options") or {}, f"{manifest}: options")
    take = options.get("take")
    if take is not None and not isinstance(take, str):
        raise UserError(f"{manifest}: `take` must be a word, found {take!r:.60}")
    return take


# -- RL ----------------------------------------------------------------------------------------------------------------


def read_rl(folder: Path, sft_runs: Sequence[SFTRun], set_name: str = "") -> RLRun:
    """Read an RL run folder. It is compared with the run of its set and seed among `sft_runs`, those of the study."""
    config, text = read_config(folder)
    seed = int(_number_setting(folder, config, "run", "seed"))
    start = read_start(folder)
    start_step, eflops_sft = start["start_step"], start["eflops_sft"]
    rows = list(_metrics(folder))
    evals = [(row, where) for row, where in rows if row["kind"] == "eval"]
    points = _rl_points(evals)
    try:
        fit, reason = _fit(points)
    except UserError as error:
        raise UserError(f"{folder / METRICS}: {error}") from None
    sft = sft_of(sft_runs, set_name, seed)
    total = eflops_sft + (points[-1].eflops_rl if points else 0.0)
    samples_step, samples = _last_rollouts(folder)
    return scored_run(
        fit,
        points,
        name=folder.name,
        folder=folder,
        config=config,
        config_text=text,
        ledger=read_ledger(folder),
        set=set_name,
        seed=seed,
        start_step=start_step,
        role=start["role"],
        algorithm=_algorithm_name(folder, config),
        eflops_sft=eflops_sft,
        start_regime=_regime_at(sft, start_step),
        p_sft=_first_score(points),
        fit_reason=reason,
        sft_equal=sft.score_at(total) if sft else NotMeasured(_no_comparison(sft_runs, start_step)),
        counts=_counts([row for row, _ in rows if row["kind"] == "train"], evals[-1][0] if evals else {}),
        samples=samples,
        samples_step=samples_step,
    )


def _rl_points(rows: Sequence[tuple[dict[str, Any], str]]) -> list[RLPoint]:
    points = [
        RLPoint(
            row["step"],
            row["eflops_rl"],
            _number(row, "score", where),
            _number(row, "score_se", where),
            _benchmarks(row, where),
        )
        for row, where in rows
    ]
    return sorted(points, key=lambda p: p.step)


def _first_score(points: Sequence[RLPoint]) -> Measurement:
    """Return the score at the switch point."""
    return next((p.measured for p in points if p.eflops_rl == 0), NotMeasured(NO_FIRST_SCORE))


def _no_comparison(sft_runs: Sequence[SFTRun], start_step: int) -> str:
    """Return the reason there is no SFT run to compare an RL run with."""
    if not sft_runs:
        return NO_SFT_RUN
    return "no SFT run has its set and seed" if start_step else "RL without SFT belongs to none of the sets"


def _benchmarks(row: dict[str, Any], where: str) -> dict[str, float]:
    return {key.removeprefix("score/"): _number(row, key, where) for key in row if key.startswith("score/")}


def _fit(points: Sequence[RLPoint]) -> tuple[Fit | None, str]:
    """Return the fit that `pctrain fit` makes of the same folder, or None and the reason there is none."""
    first = next((p for p in points if p.eflops_rl == 0), None)
    after = [p for p in points if p.eflops_rl > 0]
    if first is None:
        return None, NO_FIRST_SCORE
    if not after:
        return None, "the run was not scored after its start"
    fit = fit_ceiling(
        [p.eflops_rl for p in after],
        [p.score for p in after],
        first.score,
        score_se=typical_se(points),
        p_sft_se=first.score_se or None,
    )
    return fit, ""


def fit_run(folder: Path) -> Fit:
    """Fit the scores so far of an RL run that was scored at its start and later."""
    return fit_curve(curves.read_run_folder(folder))


def _regime_at(sft: SFTRun | None, step: int) -> str | None:
    """Return the regime of the validation nearest to `step`; of two equally near ones, the earlier."""
    if sft is None or not sft.losses:
        return None
    return min(sft.losses, key=lambda p: (abs(p.step - step), p.step)).regime


def _counts(train: Sequence[dict[str, Any]], last_eval: dict[str, Any]) -> dict[str, float]:
    """Return how much was dropped, carried over and truncated in the whole run; only what the run recorded."""
    counts = {
        key: float(sum(row[key] for row in train))
        for key in ("kept_prompts", "dropped_prompts", "carried_prompts", "rounds")
        if train and all(key in row for row in train)
    }
    if train and all("truncated_share" in row for row in train):
        counts["train_truncated_share"] = float(np.mean([row["truncated_share"] for row in train]))
    for key in ("truncated_share", "no_box_share", "problems"):
        if key in last_eval:
            counts[f"eval_{key}"] = float(last_eval[key])
    return counts


def _last_rollouts(folder: Path) -> tuple[int | None, list[dict[str, Any]]]:
    """Return the last step with rollouts and up to SAMPLES of them: one of each cause first, in the file's order."""
    files = rollout_files(folder)
    if not files:
        return None, []
    step = max(files)
    rows = [row for row, _ in read_rollouts(files[step])]
    first_of_cause: dict[Any, int] = {}
    for i, row in enumerate(rows):
        first_of_cause.setdefault(row.get("cause"), i)
    chosen = sorted(first_of_cause.values())[:SAMPLES]
    others = [i for i in range(len(rows)) if i not in chosen]
    chosen += others[: SAMPLES - len(chosen)]
    return step, [rows[i] for i in sorted(chosen)]


# -- files -------------------------------------------------------------------------------------------------------------


def _metrics(folder: Path) -> Iterator[tuple[dict[str, Any], str]]:
    """Yield (line, "file:line") of metrics.jsonl, with the EFLOPs of each line checked."""
    for row, where in read_metrics(folder):
        for key in ("eflops_sft", "eflops_rl"):
            row[key] = _number(row, key, where)
        yield row, where


def read_config(folder: Path) -> tuple[dict[str, Any], str]:
    """Return the resolved config of a run, parsed and as text."""
    return config_file.read_tree(folder), config_file.read_text(folder)


def _setting(folder: Path, config: dict[str, Any], section: str, key: str) -> Any:
    try:
        return config[section][key]
    except (KeyError, TypeError):
        raise UserError(
            f"{folder / CONFIG}: `{section}.{key}` is missing. A run writes its config resolved, with every key."
        ) from None


def _algorithm_name(folder: Path, config: dict[str, Any]) -> str:
    algorithm = _setting(folder, config, "rl", "algorithm")
    return str(algorithm["name"] if isinstance(algorithm, dict) and "name" in algorithm else algorithm)


def _number_setting(folder: Path, config: dict[str, Any], section: str, key: str) -> float:
    _setting(folder, config, section, key)
    return _number(config[section], key, f"{folder / CONFIG}: {section}")


def read_ledger(folder: Path) -> dict[str, dict[str, float]]:
    """Return the ledger's sums by phase. A ledger is required: the x of every curve comes from it."""
    rows = []
    for row, where in read_ledger_lines(folder):
        rows.append({row["phase"]: {key: _number(row, key, where) for key in LEDGER_KEYS}})
    return sum_ledgers(rows)


def _number(row: dict[str, Any], key: str, where: str) -> float:
    value = row.get(key)
    try:
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
            raise UserError(f"{where}: `{key}` must be a finite number, found {value!r:.60}.")
        return float(value)
    except OverflowError:  # a whole number above 1e308
        raise UserError(f"{where}: `{key}` must be a finite number, found one too large.") from None
