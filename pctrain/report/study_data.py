"""The data model of a study: SFT runs on one or several trajectory sets, RL runs from their checkpoints, and the numbers they give.

`reading.read_study` makes one from its folders. Compute is in EFLOPs (1e18), scores and their standard errors in percent, throughout.
Every derived number is made here once; figures and texts only show it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from pctrain.ceiling.fit import Fit

GAIN_FORMULA = (
    "gain = last score - first score; its standard error = sqrt(se_first^2 + se_last^2), both binomial. Both readings are of "
    "the same problems; the formula treats them as independent, which as a rule overstates the error of their difference."
)
LEDGER_KEYS = ("paper_flops", "exact_flops", "tokens", "sequences", "seconds", "device_seconds")
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
    benchmarks: dict[str, float] = field(
        default_factory=dict
    )  # scores of single benchmarks, percent, where the run recorded them


@dataclass(frozen=True)
class RLPoint:
    step: int
    eflops_rl: float
    score: float
    score_se: float
    benchmarks: dict[str, float] = field(default_factory=dict)


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
    ledger: dict[str, dict[str, float]]  # phase -> LEDGER_KEYS
    set: str = ""  # name of the trajectory set; "" where the study has one without a name, and for RL from step 0
    seed: int = 0
    varies: frozenset[str] = frozenset()  # of set, algorithm, seed: what differs among the runs of the study


@dataclass(frozen=True)
class SFTRun(Run):
    points: list[SFTPoint] = field(default_factory=list)
    delta: float = 0.0
    delta2: float = 0.0
    not_finite: int = 0  # validation losses that were nan or infinite, left out of the curve
    size: int | None = None  # trajectories of the set; None until the run has ended
    difficulty: str | None = None  # easy, uniform or hard, where `pctrain data select` made the set

    @property
    def label(self) -> str:
        told = [self.set] if self.set else []
        return ", ".join([*told, *([f"seed {self.seed}"] if "seed" in self.varies else [])])

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
        start = f"step {self.start_step}" + (f" ({self.role})" if self.role != "none" else "")
        told = [f"{self.set} {start}" if self.set else start]
        told += [self.algorithm] if "algorithm" in self.varies else []
        return ", ".join([*told, *([f"seed {self.seed}"] if "seed" in self.varies else [])])

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
        return difference(
            Estimate(self.last.score, self.last.score_se), Estimate(self.first.score, self.first.score_se)
        )

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
    sft: list[SFTRun]  # one for each set and seed
    rl: list[RLRun]
    just_begun: tuple[str, ...] = ()  # runs that have recorded nothing yet, and are not among these

    @property
    def runs(self) -> list[Run]:
        return [*self.sft, *self.rl]

    def sft_of(self, run: RLRun) -> SFTRun | None:
        """The SFT run of the same set and seed: the one that `run` started from, or of RL from step 0 the one to compare it with."""
        return sft_of(self.sft, run.set, run.seed)

    def ledger(self) -> dict[str, dict[str, float]]:
        """Sums over all runs, by phase."""
        return sum_ledgers([run.ledger for run in self.runs])


def as_json(study: Study) -> dict[str, Any]:
    """What study.json holds, but for the sentences. Compute in EFLOPs (`*_flops`: FLOPs), scores in percent, seconds."""
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
        "points": [asdict(p) for p in run.points],
        "bands": run.bands(),
        "minimum_step": run.best and run.best.step,
        "losses_not_finite": run.not_finite,
        "ledger": run.ledger,
    }


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
        "fit_reason": run.fit_reason,
        "curve": run.curve(),
        "counts": run.counts,
        "ledger": run.ledger,
    }
    for name, estimate in (("p_sft", run.p_sft), ("gain", run.gain), ("sft_at_equal_total", run.sft_equal)):
        values |= {name: estimate.value, f"{name}_se": estimate.se, f"{name}_reason": estimate.reason}
    return values


def typical_se(points: Sequence[RLPoint]) -> float | None:
    """Median standard error of the scores after the joint, which a fit is told; None: not known. 0 (all or no problems solved) says nothing
    about the noise elsewhere."""
    errors = [p.score_se for p in points if p.eflops_rl > 0 and p.score_se]
    return float(np.median(errors)) if errors else None


def difference(a: Estimate, b: Estimate) -> Estimate:
    """a - b of two readings taken as independent."""
    return Estimate(a.value - b.value, math.hypot(a.se, b.se))


def sft_of(runs: Sequence[SFTRun], set_name: str, seed: int) -> SFTRun | None:
    return next((run for run in runs if (run.set, run.seed) == (set_name, seed)), None)


def sum_ledgers(ledgers: list[dict[str, dict[str, float]]]) -> dict[str, dict[str, float]]:
    total: dict[str, dict[str, float]] = {}
    for ledger in ledgers:
        for phase, row in ledger.items():
            sums = total.setdefault(phase, dict.fromkeys(LEDGER_KEYS, 0.0))
            for key in LEDGER_KEYS:
                sums[key] += row[key]
    return total
