"""A study or a single run, read from its folders: `read_study` needs nothing but the files (contracts.md, "Run folder")."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from pctrain.ceiling import checks, regimes
from pctrain.ceiling.fit import Fit, fit_ceiling, fit_curve
from pctrain.common.errors import UserError
from pctrain.report import curves
from pctrain.report.study_data import (
    LEDGER_KEYS,
    Estimate,
    RLPoint,
    RLRun,
    SFTPoint,
    SFTRun,
    Study,
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

NO_JOINT = "the checkpoint was not scored before RL"
NO_SFT_RUN = "there is no SFT run in this folder"


def read_study(folder: Path) -> Study:
    """A study folder (layout.py) or one run folder. UserError names what is missing or malformed."""
    if not folder.is_dir():
        raise UserError(
            f"{folder}: no such folder. Give a study folder (with sft/ and rl-step-N/) or a single run folder."
        )
    name = folder.resolve().name
    if found := find_runs(folder):
        places = [place for place in found if _has_recorded(place.folder)]
        if not places:
            raise UserError(
                f"{folder}: its runs have only just begun and have recorded nothing yet; ask again in a moment"
            )
        begun = tuple(place.folder.relative_to(folder).as_posix() for place in found if place not in places)
        sft = [read_sft(place.folder, place.set) for place in places if place.kind == "sft"]
        rl = [read_rl(place.folder, sft, place.set) for place in places if place.kind == "rl"]
        return _told_apart(Study(name, folder, sft, rl, begun))
    if has_metrics(folder) or has_config(folder):
        if read_config(folder)[0]["kind"] == "rl":
            return Study(name, folder, [], [read_rl(folder, [])])
        return Study(name, folder, [read_sft(folder)], [])
    raise UserError(
        f"{folder}: no runs here. Expected sft/ or rl-step-N/ below it (a study), or metrics.jsonl (a run). "
        f"`pctrain run` writes a study, `pctrain sft` and `pctrain rl` write a run."
    )


def _has_recorded(run: Path) -> bool:
    """Whether it has made a step; of one that has, what is missing was lost."""
    return has_ledger(run) or (has_metrics(run) and any(row["step"] > 0 for row, _ in _metrics(run)))


def _told_apart(study: Study) -> Study:
    """With the names of the runs relative to the study, and what differs among them."""
    values = {
        "set": [run.set for run in study.sft],
        "seed": [run.seed for run in study.runs],
        "algorithm": [run.algorithm for run in study.rl],
    }
    varies = frozenset(key for key, found in values.items() if len(set(found)) > 1)
    sft, rl = (
        [replace(run, name=run.folder.relative_to(study.folder).as_posix(), varies=varies) for run in runs]
        for runs in (study.sft, study.rl)
    )
    return replace(study, sft=sft, rl=rl)


def read_sft(folder: Path, set_name: str = "") -> SFTRun:
    config, text = read_config(folder)
    delta, delta2 = (_number_setting(folder, config, "ceiling", key) for key in ("delta", "delta2"))
    points: dict[int, dict[str, Any]] = {}
    not_finite = 0
    for row, where in _metrics(folder):
        if row["kind"] == "train":
            continue
        point = points.setdefault(row["step"], {"step": row["step"], "eflops_sft": row["eflops_sft"]})
        if row["kind"] == "val":
            if row.get("val_loss", 0) is None:  # how a run folder writes nan and infinity
                not_finite += 1
            else:
                point |= {
                    "val_loss": _number(row, "val_loss", where),
                    "val_loss_se": _number(row, "val_loss_se", where),
                }
        else:
            point |= {
                "score": _number(row, "score", where),
                "score_se": _number(row, "score_se", where),
                "benchmarks": _benchmarks(row, where),
            }
    ordered = sorted((p for p in points.values() if "val_loss" in p or "score" in p), key=lambda p: p["step"])
    valid = [p for p in ordered if "val_loss" in p]
    if valid:
        try:
            labels = regimes.classify([p["eflops_sft"] for p in valid], [p["val_loss"] for p in valid], delta, delta2)
        except UserError as error:
            raise UserError(f"{folder / METRICS}: {error}") from None
        for point, label in zip(valid, labels, strict=True):
            point["regime"] = str(label)
    seed = int(_number_setting(folder, config, "run", "seed"))
    return SFTRun(
        folder.name,
        folder,
        config,
        text,
        read_ledger(folder),
        set=set_name,
        seed=seed,
        points=[SFTPoint(**p) for p in ordered],
        delta=delta,
        delta2=delta2,
        not_finite=not_finite,
        size=_trajectories(folder),
        difficulty=_difficulty(folder, config),
    )


def _trajectories(folder: Path) -> int | None:
    """Of the training set, by the summary of a finished run."""
    if not is_finished(folder):
        return None
    summary, path = read_summary(folder)["summary"], folder / SUMMARY
    trajectories = summary.get("trajectories")
    if trajectories is not None and (isinstance(trajectories, bool) or not isinstance(trajectories, int)):
        raise UserError(f"{path}: `trajectories` must be a whole number, found {trajectories!r:.60}")
    return trajectories


def _difficulty(folder: Path, config: dict[str, Any]) -> str | None:
    """What `pctrain data select --take` wrote beside the files of the set, where all of them have the same."""
    try:
        manifests = [
            Path(f"{source['path']}.manifest.json") for source in (config.get("data") or {}).get("train") or []
        ]
    except (TypeError, KeyError, AttributeError):
        raise UserError(
            f"{folder / CONFIG}: `data.train` must be a list of sources, each with its `path`"
        ) from None
    taken = {_taken(path) if path.is_file() else None for path in manifests}
    return taken.pop() if len(taken) == 1 else None


def _taken(manifest: Path) -> str | None:
    options = checks.mapping(
        checks.mapping(checks.json_of(manifest), str(manifest)).get("options") or {}, f"{manifest}: options"
    )
    take = options.get("take")
    if take is not None and not isinstance(take, str):
        raise UserError(f"{manifest}: `take` must be a word, found {take!r:.60}")
    return take


def read_rl(folder: Path, sft_runs: Sequence[SFTRun], set_name: str = "") -> RLRun:
    """`sft_runs`: of the study; the one of its set and seed is what it is compared with."""
    config, text = read_config(folder)
    seed = int(_number_setting(folder, config, "run", "seed"))
    sft = sft_of(sft_runs, set_name, seed)
    start = read_start(folder)
    points, train, last_eval = [], [], {}
    for row, where in _metrics(folder):
        if row["kind"] == "eval":
            points.append(
                RLPoint(
                    row["step"],
                    row["eflops_rl"],
                    _number(row, "score", where),
                    _number(row, "score_se", where),
                    _benchmarks(row, where),
                )
            )
            last_eval = row
        elif row["kind"] == "train":
            train.append(row)
    points.sort(key=lambda p: p.step)
    step, role, eflops_sft = int(start["start_step"]), str(start["role"]), float(start["eflops_sft"])
    joint = next((Estimate(p.score, p.score_se) for p in points if p.eflops_rl == 0), Estimate(None, reason=NO_JOINT))
    try:
        fit, reason = _fit(points)
    except UserError as error:
        raise UserError(f"{folder / METRICS}: {error}") from None
    total = eflops_sft + (points[-1].eflops_rl if points else 0.0)
    samples_step, samples = _last_rollouts(folder)
    without = NO_SFT_RUN if not sft_runs else "RL began without SFT, of none of the sets"
    return RLRun(
        folder.name,
        folder,
        config,
        text,
        read_ledger(folder),
        set=set_name,
        seed=seed,
        start_step=step,
        role=role,
        algorithm=str(_setting(folder, config, "rl", "algorithm")),
        eflops_sft=eflops_sft,
        points=points,
        start_regime=_regime_at(sft, step),
        p_sft=joint,
        fit=fit,
        fit_reason=reason,
        sft_equal=sft.score_at(total) if sft else Estimate(None, reason=without),
        counts=_counts(train, last_eval),
        samples=samples,
        samples_step=samples_step,
    )


def _benchmarks(row: dict[str, Any], where: str) -> dict[str, float]:
    return {key.removeprefix("score/"): _number(row, key, where) for key in row if key.startswith("score/")}


def _fit(points: list[RLPoint]) -> tuple[Fit | None, str | None]:
    """The fit that `pctrain fit` makes of the same folder, or the reason why there is none."""
    joint = next((p for p in points if p.eflops_rl == 0), None)
    after = [p for p in points if p.eflops_rl > 0]
    if joint is None:
        return None, NO_JOINT
    if not after:
        return None, "the run was not scored after its start"
    return fit_ceiling(
        [p.eflops_rl for p in after],
        [p.score for p in after],
        joint.score,
        score_se=typical_se(points),
        p_sft_se=joint.score_se or None,
    ), None


def fit_run(folder: Path) -> Fit:
    """Of an RL run that was scored at its start and later, so far."""
    return fit_curve(curves.read_run_folder(folder))


def _regime_at(sft: SFTRun | None, step: int) -> str | None:
    """Regime of the validation nearest to the start (the same step where SFT was validated there)."""
    near = min(sft.losses, key=lambda p: (abs(p.step - step), p.step), default=None) if sft else None
    return near.regime if near else None


def _counts(train: list[dict], last_eval: dict) -> dict[str, float]:
    """What was dropped, carried over and cut short, over the whole run; only what the run recorded."""
    counts = {
        key: float(sum(row[key] for row in train))
        for key in ("kept_prompts", "dropped_prompts", "carried_prompts", "rounds")
        if train and all(key in row for row in train)
    }
    if train and all("truncated_share" in row for row in train):
        counts["train_truncated_share"] = float(np.mean([row["truncated_share"] for row in train]))
    return counts | {
        f"eval_{key}": float(last_eval[key])
        for key in ("truncated_share", "no_box_share", "problems")
        if key in last_eval
    }


def _last_rollouts(folder: Path, limit: int = 6) -> tuple[int | None, list[dict[str, Any]]]:
    """Up to `limit` rollouts of the last step: first one of each cause, then in the file's order."""
    files = rollout_files(folder)
    if not files:
        return None, []
    rows = [row for row, _ in read_rollouts(files[max(files)])]
    first_of_cause = {row.get("cause"): i for i, row in reversed(list(enumerate(rows)))}
    chosen = sorted(first_of_cause.values())[:limit]
    chosen += [i for i in range(len(rows)) if i not in chosen][: limit - len(chosen)]
    return max(files), [rows[i] for i in sorted(chosen)]


# -- files -------------------------------------------------------------------------------------------------------------------------


def _metrics(folder: Path) -> Iterator[tuple[dict[str, Any], str]]:
    """Yield (line, "file:line") of the metrics, with the EFLOPs of each checked."""
    for row, where in read_metrics(folder):
        for key in ("eflops_sft", "eflops_rl"):
            row[key] = _number(row, key, where)
        yield row, where


def read_config(folder: Path) -> tuple[dict[str, Any], str]:
    """Return the config of a run as plain values, and its text."""
    return config_file.read_tree(folder), config_file.read_text(folder)


def _setting(folder: Path, config: dict[str, Any], section: str, key: str) -> Any:
    try:
        return config[section][key]
    except (KeyError, TypeError):
        raise UserError(
            f"{folder / CONFIG}: `{section}.{key}` is missing; the config of a run is written resolved, with every "
            f"key."
        ) from None


def _number_setting(folder: Path, config: dict[str, Any], section: str, key: str) -> float:
    _setting(folder, config, section, key)
    return _number(config[section], key, f"{folder / CONFIG}: {section}")


def read_ledger(folder: Path) -> dict[str, dict[str, float]]:
    """Sums by phase, in no particular order. A run without a ledger is refused: the x of every curve rests on it."""
    rows = [
        {row["phase"]: {key: _number(row, key, where) for key in LEDGER_KEYS}} for row, where in read_ledger_lines(folder)
    ]
    return sum_ledgers(rows)


def _number(row: dict[str, Any], key: str, where: str) -> float:
    value = row.get(key)
    try:
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
            raise UserError(f"{where}: `{key}` must be a finite number, found {value!r:.60}.")
        return float(value)
    except OverflowError:  # a whole number above 1e308
        raise UserError(f"{where}: `{key}` must be a finite number, found one too large.") from None
