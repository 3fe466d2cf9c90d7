"""The data model of a study: SFT runs on one or several trajectory sets, RL runs from their checkpoints, and the
numbers they give.

`reading.read_study` builds one from its folders. Compute is in EFLOPs (1e18 FLOPs); scores and their standard errors
are in percent. Every derived number is computed here once; figures and texts only show it.

What may be absent has a type: `Measured | NotMeasured` for a number (`value is None` tells them from each other), and
`RLRun`, `ScoredRun`, `FittedRun` for an RL run without scores, with at least one score, and with a fit.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from pctrain.ceiling.fit import Fit
from pctrain.ceiling.stats import Measured, difference

GAIN_FORMULA = (
    "gain = last score - first score; its standard error = sqrt(se_first^2 + se_last^2), both binomial. "
    "Both scores are on the same problems. The formula treats them as independent, which usually overstates "
    "the error of their difference."
)
LEDGER_KEYS = ("paper_flops", "exact_flops", "tokens", "sequences", "seconds", "device_seconds")
CURVE_POINTS = 121  # samples of a fitted curve for drawing; a sigmoid is smooth, so more would not be visible


@dataclass(frozen=True)
class NotMeasured:
    """The reason a number does not exist. `x.value is None` separates it from `Measured`."""

    reason: str
    value: None = None
    se: None = None


Measurement = Measured | NotMeasured


@dataclass(frozen=True)
class SFTLoss:
    """A validation of an SFT run: loss in nats per token."""

    step: int
    eflops_sft: float
    val_loss: float
    val_loss_se: float
    regime: str


@dataclass(frozen=True)
class SFTScore:
    """A score of an SFT run, percent. `benchmarks`: the scores of single benchmarks, if the run recorded them."""

    step: int
    eflops_sft: float
    score: float
    score_se: float
    benchmarks: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class RLPoint:
    """A score of an RL run, percent. `eflops_rl` counts from the switch point."""

    step: int
    eflops_rl: float
    score: float
    score_se: float
    benchmarks: dict[str, float] = field(default_factory=dict)

    @property
    def measured(self) -> Measured:
        """The score with its standard error."""
        return Measured(self.score, self.score_se)


@dataclass(frozen=True)
class Run:
    """The fields that SFT and RL runs share."""

    name: str
    folder: Path
    config: dict[str, Any]
    config_text: str
    ledger: dict[str, dict[str, float]]  # phase -> LEDGER_KEYS
    set: str = ""  # trajectory set; "" for a study with one unnamed set, and for RL from step 0
    seed: int = 0
    varies: frozenset[str] = frozenset()  # of set, algorithm, seed: the ones that differ among the runs of the study


@dataclass(frozen=True)
class SFTRun(Run):
    """An SFT run with its validation losses and scores, each in the order of its steps."""

    losses: list[SFTLoss] = field(default_factory=list)
    scores: list[SFTScore] = field(default_factory=list)
    delta: float = 0.0
    delta2: float = 0.0
    not_finite: int = 0  # validation losses that were nan or infinite; they are not in `losses`
    size: int | None = None  # trajectories in the set; None until the run has ended
    difficulty: str | None = None  # easy, uniform or hard, if `pctrain data select` made the set

    @property
    def label(self) -> str:
        """Name of the run among the SFT runs of its study."""
        parts = [self.set] if self.set else []
        if "seed" in self.varies:
            parts.append(f"seed {self.seed}")
        return ", ".join(parts)

    @property
    def best(self) -> SFTLoss | None:
        """The validation with the smallest loss."""
        return min(self.losses, key=lambda p: p.val_loss, default=None)

    @property
    def end(self) -> SFTLoss | SFTScore | None:
        """The last validation or score, whichever came later."""
        measurements: list[SFTLoss | SFTScore] = [*self.losses, *self.scores]
        return max(measurements, key=lambda p: p.step, default=None)

    @property
    def points(self) -> list[SFTScore]:
        """The scores, under the name they have in an RL run."""
        return self.scores

    def bands(self) -> list[dict[str, Any]]:
        """Return intervals of equal regime along SFT compute, `{from, to, regime}` in EFLOPs.

        The bounds are midway between two validations.
        """
        bands: list[dict[str, Any]] = []
        previous: SFTLoss | None = None
        for point in self.losses:
            if bands and bands[-1]["regime"] == point.regime:
                bands[-1]["to"] = point.eflops_sft
            else:
                bound = point.eflops_sft if previous is None else (previous.eflops_sft + point.eflops_sft) / 2
                if bands:
                    bands[-1]["to"] = bound
                bands.append({"from": bound, "to": point.eflops_sft, "regime": point.regime})
            previous = point
        return bands

    def score_at(self, eflops: float) -> Measurement:
        """Return the score of pure SFT at `eflops` of training: linear between two scores, never extrapolated."""
        if len(self.scores) < 2:
            return NotMeasured("the SFT run was scored at fewer than two steps")
        x = np.array([p.eflops_sft for p in self.scores])
        if not x[0] <= eflops <= x[-1]:
            side = "ended before" if eflops > x[-1] else "was first scored after"
            return NotMeasured(f"the SFT run {side} this much compute")
        right = max(1, int(np.searchsorted(x, eflops)))
        a, b = self.scores[right - 1], self.scores[right]
        w = (eflops - a.eflops_sft) / (b.eflops_sft - a.eflops_sft)
        return Measured((1 - w) * a.score + w * b.score, math.hypot((1 - w) * a.score_se, w * b.score_se))


@dataclass(frozen=True)
class RLRun(Run):
    """An RL run. `scored_run` makes the `ScoredRun` or `FittedRun` that its points and fit allow."""

    start_step: int = 0
    role: str = "none"
    algorithm: str = ""
    eflops_sft: float = 0.0
    points: list[RLPoint] = field(default_factory=list)
    start_regime: str | None = None
    p_sft: Measurement = NotMeasured("the run was not scored")
    fit: Fit | None = field(default=None, init=False)
    fit_reason: str = ""  # why there is no fit
    sft_equal: Measurement = NotMeasured("there is no SFT run")  # score of pure SFT at the total compute of this run
    counts: dict[str, float] = field(default_factory=dict)
    samples: list[dict[str, Any]] = field(default_factory=list)
    samples_step: int | None = None

    @property
    def label(self) -> str:
        """Name of the run among the RL runs of its study."""
        start = f"step {self.start_step}" + (f" ({self.role})" if self.role != "none" else "")
        parts = [f"{self.set} {start}" if self.set else start]
        if "algorithm" in self.varies:
            parts.append(self.algorithm)
        if "seed" in self.varies:
            parts.append(f"seed {self.seed}")
        return ", ".join(parts)

    @property
    def first(self) -> RLPoint | None:
        """The first score."""
        return self.points[0] if self.points else None

    @property
    def last(self) -> RLPoint | None:
        """The last score."""
        return self.points[-1] if self.points else None

    @property
    def eflops_total(self) -> float:
        """EFLOPs of SFT and RL up to the last score."""
        return self.eflops_sft + (self.points[-1].eflops_rl if self.points else 0.0)

    @property
    def gain(self) -> Measurement:
        """Last score minus first, in points (GAIN_FORMULA)."""
        if len(self.points) < 2:
            return NotMeasured("the run was scored fewer than two times")
        return difference(self.points[-1].measured, self.points[0].measured)

    def curve(self) -> dict[str, list[float]] | None:
        """Return the fitted sigmoid over the measured range, or None if there is no fit."""
        return None


@dataclass(frozen=True)
class ScoredRun(RLRun):
    """An RL run with at least one score."""

    @property
    def first(self) -> RLPoint:
        """The first score."""
        return self.points[0]

    @property
    def last(self) -> RLPoint:
        """The last score."""
        return self.points[-1]


@dataclass(frozen=True)
class FittedRun(ScoredRun):
    """An RL run with a fit: it was scored at its start and later."""

    fit: Fit = field(kw_only=True)

    def curve(self) -> dict[str, list[float]] | None:
        """Return `{eflops_rl, median, low, high}` over the measured range, or None if a value is not finite."""
        x = np.linspace(0.0, self.last.eflops_rl, CURVE_POINTS)
        median, low, high = (np.asarray(values, dtype=float) for values in self.fit.curve(x))
        if not all(np.isfinite(values).all() for values in (median, low, high)):
            return None
        return {"eflops_rl": x.tolist(), "median": median.tolist(), "low": low.tolist(), "high": high.tolist()}


@dataclass(frozen=True)
class Study:
    """The runs of a study."""

    name: str
    folder: Path
    sft: list[SFTRun]  # one for each set and seed
    rl: list[RLRun]
    just_begun: tuple[str, ...] = ()  # names of runs that have recorded nothing yet and are not in the lists

    @property
    def runs(self) -> list[SFTRun | RLRun]:
        """All runs, SFT first."""
        return [*self.sft, *self.rl]

    @property
    def scored(self) -> list[ScoredRun]:
        """The RL runs with at least one score."""
        return [run for run in self.rl if isinstance(run, ScoredRun)]

    @property
    def fitted(self) -> list[FittedRun]:
        """The RL runs with a fit."""
        return [run for run in self.rl if isinstance(run, FittedRun)]

    def sft_of(self, run: RLRun) -> SFTRun | None:
        """Return the SFT run that `run` started from or, for RL from step 0, is compared with."""
        return sft_of(self.sft, run.set, run.seed)

    def ledger(self) -> dict[str, dict[str, float]]:
        """Return the sums over all runs, by phase."""
        return sum_ledgers([run.ledger for run in self.runs])


def scored_run(fit: Fit | None, points: list[RLPoint], **fields: Any) -> RLRun:
    """Return the RL run of these fields: a `FittedRun` with a fit, else a `ScoredRun` with points, else an `RLRun`."""
    if fit is not None:
        return FittedRun(points=points, fit=fit, **fields)
    return ScoredRun(points=points, **fields) if points else RLRun(**fields)


def as_json(study: Study) -> dict[str, Any]:
    """Return the numbers of study.json: EFLOPs (`*_flops`: FLOPs), percent, seconds."""
    return {
        "name": study.name,
        "gain_formula": GAIN_FORMULA,
        "sft": [_sft_json(run) for run in study.sft],
        "rl": [_rl_json(run, study.name) for run in study.rl],
        "ledger": study.ledger(),
    }


def _sft_json(run: SFTRun) -> dict[str, Any]:
    return {
        "folder": run.name,
        "set": run.set,
        "seed": run.seed,
        "size": run.size,
        "difficulty": run.difficulty,
        "delta": run.delta,
        "delta2": run.delta2,
        "points": _sft_points(run),
        "bands": run.bands(),
        "minimum_step": run.best and run.best.step,
        "losses_not_finite": run.not_finite,
        "ledger": run.ledger,
    }


def _sft_points(run: SFTRun) -> list[dict[str, Any]]:
    """Return one object per step that was validated, scored, or both; a value that was not measured there is None."""
    empty: dict[str, Any] = {
        "val_loss": None,
        "val_loss_se": None,
        "score": None,
        "score_se": None,
        "regime": None,
        "benchmarks": {},
    }
    rows: dict[int, dict[str, Any]] = {}
    measurements: list[SFTLoss | SFTScore] = [*run.losses, *run.scores]
    for point in measurements:
        row = rows.setdefault(point.step, {"step": point.step, "eflops_sft": point.eflops_sft, **empty})
        row.update(asdict(point))
    return [rows[step] for step in sorted(rows)]


def _rl_json(run: RLRun, dataset: str) -> dict[str, Any]:
    values = {
        "folder": run.name,
        "set": run.set,
        "seed": run.seed,
        "start_step": run.start_step,
        "role": run.role,
        "regime": run.start_regime,
        "algorithm": run.algorithm,
        "eflops_sft": run.eflops_sft,
        "eflops_total": run.eflops_total,
        "points": [asdict(p) for p in run.points],
        "fit": run.fit and run.fit.as_row(run.set or dataset, run.start_step),
        "fit_reason": run.fit_reason or None,
        "curve": run.curve(),
        "counts": run.counts,
        "ledger": run.ledger,
    }
    for name, measurement in (("p_sft", run.p_sft), ("gain", run.gain), ("sft_at_equal_total", run.sft_equal)):
        reason = measurement.reason if isinstance(measurement, NotMeasured) else None
        values |= {name: measurement.value, f"{name}_se": measurement.se, f"{name}_reason": reason}
    return values


def typical_se(points: Sequence[RLPoint]) -> float | None:
    """Return the median standard error of the scores after the switch point, or None if it is unknown.

    A standard error of 0 (all or no problems solved) says nothing about the noise of other scores and is left out.
    """
    errors = [p.score_se for p in points if p.eflops_rl > 0 and p.score_se]
    return float(np.median(errors)) if errors else None


def sft_of(runs: Sequence[SFTRun], set_name: str, seed: int) -> SFTRun | None:
    """Return the SFT run of a set and a seed."""
    return next((run for run in runs if (run.set, run.seed) == (set_name, seed)), None)


def sum_ledgers(ledgers: Sequence[dict[str, dict[str, float]]]) -> dict[str, dict[str, float]]:
    """Return the sums of several ledgers, by phase."""
    total: dict[str, dict[str, float]] = {}
    for ledger in ledgers:
        for phase, row in ledger.items():
            sums = total.setdefault(phase, dict.fromkeys(LEDGER_KEYS, 0.0))
            for key in LEDGER_KEYS:
                sums[key] += row[key]
    return total
