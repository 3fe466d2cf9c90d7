"""A study or a single run, read from its folders and turned into the numbers that the report states.

`read_study(folder)` needs nothing but the files (contracts.md, "Run folder"): no torch, no engine. Compute is in EFLOPs (1e18),
scores and their standard errors in percent, throughout. Every derived number is made here once; figures and texts only show it.
"""

from __future__ import annotations

import json
import math
import re
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Iterator

import numpy as np
import yaml

from pctrain.ceiling import curves, regimes
from pctrain.ceiling.fit import Fit, fit_ceiling
from pctrain.ceiling.ledger import PHASES
from pctrain.errors import UserError

GAIN_FORMULA = ("gain = last score - first score; its standard error = sqrt(se_first^2 + se_last^2), both binomial. Both readings are of "
                "the same problems; the formula treats them as independent, which as a rule overstates the error of their difference.")
NO_JOINT = "the checkpoint was not scored before RL"
ROLES = ("early", "stable", "overfit", "none")
LEDGER_KEYS = ("paper_flops", "exact_flops", "tokens", "sequences", "seconds")
CURVE_POINTS = 121  # samples of a fitted curve for drawing; a sigmoid is smooth, more would not be seen


@dataclass(frozen=True)
class SFTPoint:
    """One step at which the SFT run was validated, scored, or both; what was not measured there is None."""

    step: int
    eflops_sft: float
    val_loss: float | None = None
    val_loss_se: float | None = None
    score: float | None = None
    score_se: float | None = None
    regime: str | None = None


@dataclass(frozen=True)
class RLPoint:
    step: int
    eflops_rl: float
    score: float
    score_se: float


@dataclass(frozen=True)
class Estimate:
    """A number with its standard error, or None and the reason why there is none."""

    value: float | None
    se: float | None = None
    reason: str | None = None


@dataclass(frozen=True)
class Run:
    """What every run folder has, whichever engine wrote it."""

    name: str
    folder: Path
    config: dict[str, Any]
    config_text: str
    ledger: dict[str, dict[str, float]]  # phase -> paper_flops, exact_flops, tokens, sequences, seconds


@dataclass(frozen=True)
class SFTRun(Run):
    points: list[SFTPoint] = field(default_factory=list)
    delta: float = 0.0
    delta2: float = 0.0
    not_finite: int = 0  # validation losses that were nan or infinite, left out of the curve

    @property
    def losses(self) -> list[SFTPoint]:
        return [p for p in self.points if p.val_loss is not None]

    @property
    def scores(self) -> list[SFTPoint]:
        return [p for p in self.points if p.score is not None]

    @property
    def best(self) -> SFTPoint | None:
        """The point of the smallest validation loss."""
        return min(self.losses, key=lambda p: p.val_loss, default=None)

    def bands(self) -> list[dict[str, Any]]:
        """Intervals of equal regime along SFT compute, `{from, to, regime}` in EFLOPs, bounds midway between two validations."""
        bands: list[dict[str, Any]] = []
        for before, point in zip([None, *self.losses], self.losses):
            if bands and bands[-1]["regime"] == point.regime:
                bands[-1]["to"] = point.eflops_sft
                continue
            bound = point.eflops_sft if before is None else (before.eflops_sft + point.eflops_sft) / 2
            if bands:
                bands[-1]["to"] = bound
            bands.append({"from": bound, "to": point.eflops_sft, "regime": point.regime})
        return bands

    def score_at(self, eflops: float) -> Estimate:
        """Score of pure SFT at `eflops` of training, linear between its two nearest scores; never extrapolated."""
        if len(self.scores) < 2:
            return Estimate(None, reason="the SFT run was scored at fewer than two steps")
        x = np.array([p.eflops_sft for p in self.scores])
        if not x[0] <= eflops <= x[-1]:
            side = "ended before" if eflops > x[-1] else "was first scored after"
            return Estimate(None, reason=f"the SFT run {side} this much compute")
        right = max(1, int(np.searchsorted(x, eflops)))
        a, b = self.scores[right - 1], self.scores[right]
        w = (eflops - a.eflops_sft) / (b.eflops_sft - a.eflops_sft)
        return Estimate((1 - w) * a.score + w * b.score, math.hypot((1 - w) * a.score_se, w * b.score_se))


@dataclass(frozen=True)
class RLRun(Run):
    start_step: int = 0
    role: str = "none"
    algorithm: str = ""
    eflops_sft: float = 0.0
    points: list[RLPoint] = field(default_factory=list)
    start_regime: str | None = None
    p_sft: Estimate = Estimate(None)
    fit: Fit | None = None
    fit_reason: str | None = None
    sft_equal: Estimate = Estimate(None)
    counts: dict[str, float] = field(default_factory=dict)
    samples: list[dict[str, Any]] = field(default_factory=list)
    samples_step: int | None = None

    @property
    def label(self) -> str:
        return f"step {self.start_step}" + (f" ({self.role})" if self.role != "none" else "")

    @property
    def first(self) -> RLPoint | None:
        return self.points[0] if self.points else None

    @property
    def last(self) -> RLPoint | None:
        return self.points[-1] if self.points else None

    @property
    def eflops_total(self) -> float:
        return self.eflops_sft + (self.last.eflops_rl if self.last else 0.0)

    @property
    def gain(self) -> Estimate:
        """Last score minus first, in points (GAIN_FORMULA)."""
        if len(self.points) < 2:
            return Estimate(None, reason="the run was scored fewer than two times")
        return difference(Estimate(self.last.score, self.last.score_se), Estimate(self.first.score, self.first.score_se))

    def curve(self) -> dict[str, list[float]] | None:
        """The fitted sigmoid over the measured range: `{eflops_rl, median, low, high}`, or None where nothing was fitted."""
        if self.fit is None:
            return None
        x = np.linspace(0.0, self.last.eflops_rl, CURVE_POINTS)
        median, low, high = (np.asarray(values, dtype=float) for values in self.fit.curve(x))
        if not all(np.isfinite(values).all() for values in (median, low, high)):
            return None
        return {"eflops_rl": x.tolist(), "median": median.tolist(), "low": low.tolist(), "high": high.tolist()}


@dataclass(frozen=True)
class Study:
    name: str
    folder: Path
    sft: SFTRun | None
    rl: list[RLRun]

    @property
    def runs(self) -> list[Run]:
        return ([self.sft] if self.sft else []) + list(self.rl)

    def ledger(self) -> dict[str, dict[str, float]]:
        """Sums over all runs, by phase."""
        return sum_ledgers([run.ledger for run in self.runs])


def as_json(study: Study) -> dict[str, Any]:
    """What study.json holds, but for the sentences. Compute in EFLOPs (`*_flops`: FLOPs), scores in percent, seconds."""
    sft = study.sft and {
        "folder": study.sft.name, "delta": study.sft.delta, "delta2": study.sft.delta2, "points": [asdict(p) for p in study.sft.points],
        "bands": study.sft.bands(), "minimum_step": study.sft.best and study.sft.best.step, "losses_not_finite": study.sft.not_finite,
        "ledger": study.sft.ledger,
    }
    return {"name": study.name, "gain_formula": GAIN_FORMULA, "sft": sft, "rl": [_rl_json(run, study.name) for run in study.rl],
            "ledger": study.ledger()}


def _rl_json(run: RLRun, dataset: str) -> dict[str, Any]:
    values = {
        "folder": run.name, "start_step": run.start_step, "role": run.role, "regime": run.start_regime, "algorithm": run.algorithm,
        "eflops_sft": run.eflops_sft, "eflops_total": run.eflops_total, "points": [asdict(p) for p in run.points],
        "fit": run.fit and run.fit.as_row(dataset, run.start_step), "fit_reason": run.fit_reason, "curve": run.curve(),
        "counts": run.counts, "ledger": run.ledger,
    }
    for name, estimate in (("p_sft", run.p_sft), ("gain", run.gain), ("sft_at_equal_total", run.sft_equal)):
        values |= {name: estimate.value, f"{name}_se": estimate.se, f"{name}_reason": estimate.reason}
    return values


def difference(a: Estimate, b: Estimate) -> Estimate:
    """a - b of two readings taken as independent."""
    return Estimate(a.value - b.value, math.hypot(a.se, b.se))


# -- reading -----------------------------------------------------------------------------------------------------------------------

def read_study(folder: Path) -> Study:
    """A study folder (`sft/`, `rl-step-N/`) or one run folder. UserError names what is missing or malformed."""
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder. Give a study folder (with sft/ and rl-step-N/) or a single run folder.")
    name = folder.resolve().name
    starts = sorted((int(m[1]), path) for path in folder.iterdir() if (m := re.fullmatch(r"rl-step-(\d+)", path.name)) and path.is_dir())
    if starts or (folder / "sft").is_dir():
        sft = read_sft(folder / "sft") if (folder / "sft").is_dir() else None
        return Study(name, folder, sft, [read_rl(path, sft) for _, path in starts])
    if (folder / "metrics.jsonl").exists() or (folder / "config.yaml").exists():
        if read_config(folder)[0]["kind"] == "rl":
            return Study(name, folder, None, [read_rl(folder, None)])
        return Study(name, folder, read_sft(folder), [])
    raise UserError(f"{folder}: no runs here. Expected sft/ or rl-step-N/ below it (a study), or metrics.jsonl (a run). "
                    f"`pctrain run` writes a study, `pctrain sft` and `pctrain rl` write a run.")


def read_sft(folder: Path) -> SFTRun:
    config, text = read_config(folder)
    delta, delta2 = (_setting(folder, config, "ceiling", key) for key in ("delta", "delta2"))
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
                point |= {"val_loss": _number(row, "val_loss", where), "val_loss_se": _number(row, "val_loss_se", where)}
        else:
            point |= {"score": _number(row, "score", where), "score_se": _number(row, "score_se", where)}
    ordered = sorted((p for p in points.values() if "val_loss" in p or "score" in p), key=lambda p: p["step"])
    valid = [p for p in ordered if "val_loss" in p]
    if valid:
        try:
            labels = regimes.classify([p["eflops_sft"] for p in valid], [p["val_loss"] for p in valid], delta, delta2)
        except UserError as error:
            raise UserError(f"{folder / 'metrics.jsonl'}: {error}") from None
        for point, label in zip(valid, labels, strict=True):
            point["regime"] = str(label)
    return SFTRun(folder.name, folder, config, text, read_ledger(folder), [SFTPoint(**p) for p in ordered], delta, delta2, not_finite)


def read_rl(folder: Path, sft: SFTRun | None) -> RLRun:
    config, text = read_config(folder)
    start = _read_start(folder)
    points, train, last_eval = [], [], {}
    for row, where in _metrics(folder):
        if row["kind"] == "eval":
            points.append(RLPoint(row["step"], row["eflops_rl"], _number(row, "score", where), _number(row, "score_se", where)))
            last_eval = row
        elif row["kind"] == "train":
            train.append(row)
    points.sort(key=lambda p: p.step)
    step, role, eflops_sft = int(start["start_step"]), str(start["role"]), float(start["eflops_sft"])
    joint = next((Estimate(p.score, p.score_se) for p in points if p.eflops_rl == 0), Estimate(None, reason=NO_JOINT))
    fit, reason = _fit(folder, points)
    total = eflops_sft + (points[-1].eflops_rl if points else 0.0)
    samples_step, samples = _last_rollouts(folder)
    return RLRun(folder.name, folder, config, text, read_ledger(folder), start_step=step, role=role,
                 algorithm=str(_setting(folder, config, "rl", "algorithm")), eflops_sft=eflops_sft, points=points,
                 start_regime=_regime_at(sft, step), p_sft=joint, fit=fit, fit_reason=reason,
                 sft_equal=sft.score_at(total) if sft else Estimate(None, reason="there is no SFT run in this folder"),
                 counts=_counts(train, last_eval), samples=samples, samples_step=samples_step)


def _fit(folder: Path, points: list[RLPoint]) -> tuple[Fit | None, str | None]:
    """The fit that `pctrain fit` makes of the same folder, or the reason why there is none."""
    if not any(p.eflops_rl == 0 for p in points):
        return None, NO_JOINT
    if points[-1].eflops_rl == 0:
        return None, "the run was not scored after its start"
    curve = curves.read_run_folder(folder)
    return fit_ceiling(curve.eflops, curve.scores, curve.p_sft, score_se=curve.score_se, p_sft_se=curve.p_sft_se), None


def _regime_at(sft: SFTRun | None, step: int) -> str | None:
    """Regime of the validation nearest to the start (the same step where SFT was validated there)."""
    near = min(sft.losses, key=lambda p: (abs(p.step - step), p.step), default=None) if sft else None
    return near.regime if near else None


def _counts(train: list[dict], last_eval: dict) -> dict[str, float]:
    """What was dropped, carried over and cut short, over the whole run; only what the run recorded."""
    counts = {key: float(sum(row[key] for row in train)) for key in ("kept_prompts", "dropped_prompts", "carried_prompts", "rounds")
              if train and all(key in row for row in train)}
    if train and all("truncated_share" in row for row in train):
        counts["train_truncated_share"] = float(np.mean([row["truncated_share"] for row in train]))
    return counts | {f"eval_{key}": float(last_eval[key]) for key in ("truncated_share", "no_box_share", "problems") if key in last_eval}


def _last_rollouts(folder: Path, limit: int = 6) -> tuple[int | None, list[dict[str, Any]]]:
    """Up to `limit` rollouts of the last step: first one of each cause, then in the file's order."""
    files = {int(m[1]): path for path in (folder / "rollouts").glob("step-*.jsonl") if (m := re.fullmatch(r"step-(\d+)\.jsonl", path.name))}
    if not files:
        return None, []
    rows = [row for row, _ in read_lines(files[max(files)])]
    first_of_cause = {row.get("cause"): i for i, row in reversed(list(enumerate(rows)))}
    chosen = sorted(first_of_cause.values())[:limit]
    chosen += [i for i in range(len(rows)) if i not in chosen][:limit - len(chosen)]
    return max(files), [rows[i] for i in sorted(chosen)]


# -- files -------------------------------------------------------------------------------------------------------------------------

def read_lines(path: Path) -> Iterator[tuple[dict[str, Any], str]]:
    """`(object, "file:line")` of a JSON-lines file."""
    with path.open(encoding="utf-8", errors="strict") as lines:
        try:
            for number, line in enumerate(lines, 1):
                where = f"{path}:{number}"
                try:
                    row = json.loads(line)
                except json.JSONDecodeError as error:
                    raise UserError(f"{where}: not JSON ({error.msg}). Expected one object a line; a run that was killed here mends its "
                                    f"files when the same command is started again.") from None
                if not isinstance(row, dict):
                    raise UserError(f"{where}: expected a JSON object, found {type(row).__name__}.")
                yield row, where
        except UnicodeDecodeError as error:
            raise UserError(f"{path}: not UTF-8 text ({error.reason} at byte {error.start}).") from None


def _metrics(folder: Path) -> Iterator[tuple[dict[str, Any], str]]:
    path = folder / "metrics.jsonl"
    if not path.exists():
        raise UserError(f"{path}: missing. The run has recorded nothing yet; start it again with the same command, then report.")
    for row, where in read_lines(path):
        if row.get("kind") not in ("train", "val", "eval"):
            raise UserError(f"{where}: `kind` must be train, val or eval, found {row.get('kind')!r}.")
        if not isinstance(row.get("step"), int) or isinstance(row.get("step"), bool):
            raise UserError(f"{where}: `step` must be a whole number, found {row.get('step')!r}.")
        for key in ("eflops_sft", "eflops_rl"):
            row[key] = _number(row, key, where)
        yield row, where


def read_config(folder: Path) -> tuple[dict[str, Any], str]:
    path = folder / "config.yaml"
    if not path.exists():
        raise UserError(f"{path}: missing. Every run folder has the resolved config of its run; is {folder} a run folder?")
    text = path.read_text(encoding="utf-8")
    try:
        config = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UserError(f"{path}: not YAML ({error}).") from None
    if not isinstance(config, dict) or config.get("kind") not in ("sft", "rl"):
        raise UserError(f"{path}: not the config of a run; expected a tree of settings with `kind: sft` or `kind: rl`.")
    return config, text


def _setting(folder: Path, config: dict[str, Any], section: str, key: str) -> Any:
    try:
        return config[section][key]
    except (KeyError, TypeError):
        raise UserError(f"{folder / 'config.yaml'}: `{section}.{key}` is missing; the config of a run is written resolved, with every "
                        f"key.") from None


def read_ledger(folder: Path) -> dict[str, dict[str, float]]:
    """Sums by phase, in no particular order. A run without a ledger is refused: the x of every curve rests on it."""
    path = folder / "ledger.jsonl"
    if not path.exists():
        raise UserError(f"{path}: missing. Every run folder has the ledger of its compute.")
    rows = []
    for row, where in read_lines(path):
        if row.get("phase") not in PHASES:
            raise UserError(f"{where}: `phase` must be one of {', '.join(PHASES)}, found {row.get('phase')!r}.")
        rows.append({row["phase"]: {key: _number(row, key, where) for key in LEDGER_KEYS}})
    return sum_ledgers(rows)


def sum_ledgers(ledgers: list[dict[str, dict[str, float]]]) -> dict[str, dict[str, float]]:
    total: dict[str, dict[str, float]] = {}
    for ledger in ledgers:
        for phase, row in ledger.items():
            sums = total.setdefault(phase, dict.fromkeys(LEDGER_KEYS, 0.0))
            for key in LEDGER_KEYS:
                sums[key] += row[key]
    return total


def _read_start(folder: Path) -> dict[str, Any]:
    path = folder / "start.json"
    if not path.exists():
        raise UserError(f"{path}: missing. An RL run folder says there which checkpoint it started from.")
    try:
        start = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise UserError(f"{path}:{error.lineno}: not JSON ({error.msg}).") from None
    if not isinstance(start, dict):
        raise UserError(f"{path}: expected a JSON object, found {type(start).__name__}.")
    if start.get("role") not in ROLES:
        raise UserError(f"{path}: `role` must be one of {', '.join(ROLES)}, found {start.get('role')!r}.")
    for key in ("start_step", "eflops_sft"):
        _number(start, key, str(path))
    return start


def _number(row: dict[str, Any], key: str, where: str) -> float:
    value = row.get(key)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise UserError(f"{where}: `{key}` must be a finite number, found {value!r}.")
    return float(value)
