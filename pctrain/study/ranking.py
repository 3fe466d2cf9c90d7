"""The ranking of candidate sets from their probes: the minima of the validation loss, and which of them differ."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

from pctrain.ceiling.stats import Measured, difference, mean_over_seeds
from pctrain.run.records import read_ledger, read_values

CRITERION = (
    "two candidates differ if the 95% interval of the difference of their mean minima over seeds excludes zero "
    "(Welch's t, unequal variances)"
)


@dataclass(frozen=True)
class Probe:
    """A short SFT run on a candidate set. `eflops` is its training compute by the paper's formula."""

    seed: int
    losses: dict[int, float]  # step -> validation loss
    minimum: float
    step: int  # of the minimum
    steps: int  # trained
    eflops: float
    seconds: float

    @property
    def too_short(self) -> bool:
        """True if the loss was lowest at the last validation, so that the minimum may come later."""
        return self.step == max(self.losses)


@dataclass(frozen=True)
class Candidate:
    """A candidate set with its probes, one per seed."""

    name: str
    path: Path
    probes: list[Probe]

    @property
    def minima(self) -> list[float]:
        """The minimum validation loss of each probe."""
        return [probe.minimum for probe in self.probes]

    @property
    def mean(self) -> float:
        """The mean minimum over seeds."""
        return statistics.fmean(self.minima)

    @property
    def spread(self) -> float | None:
        """Standard deviation of the minimum over seeds, or None with a single seed."""
        return statistics.stdev(self.minima) if len(self.probes) > 1 else None


@dataclass(frozen=True)
class Comparison:
    """The mean minimum of `worse` minus that of `better`. `interval` is None with one seed, which gives none."""

    better: str
    worse: str
    difference: float
    interval: Measured | None

    def as_json(self) -> dict[str, Any]:
        """Return the entry of `differences` in rank.json."""
        interval = self.interval
        return {
            "better": self.better,
            "worse": self.worse,
            "difference": self.difference,
            "low": interval and interval.low,
            "high": interval and interval.high,
            "told_apart": interval and interval.excludes_zero,
        }

    def __str__(self) -> str:
        if self.interval is None:
            return (
                f"{self.better} has a lower minimum than {self.worse} by {self.difference:.4f} (one seed, no interval)"
            )
        size = f"{self.difference:.4f} (95% interval {self.interval.low:.4f} to {self.interval.high:.4f})"
        if self.interval.excludes_zero:
            return f"{self.better} has a lower minimum than {self.worse} by {size}"
        return f"{self.better} and {self.worse} are statistically indistinguishable: difference {size}"


def read_probe(folder: Path, seed: int) -> Probe:
    """Read the run folder of a probe."""
    losses = read_values(folder, "val", "val_loss")
    ledger = [entry for entry, _ in read_ledger(folder)]
    step = min(losses, key=lambda step: losses[step])
    eflops = read_values(folder, "val", "eflops_sft")
    return Probe(
        seed=seed,
        losses=losses,
        minimum=losses[step],
        step=step,
        steps=max(losses),
        eflops=eflops[max(eflops)],
        seconds=sum(line["seconds"] for line in ledger),
    )


def rank(candidates: Sequence[Candidate]) -> tuple[list[Candidate], list[Comparison]]:
    """Return the candidates by mean minimum, the lowest first, and the comparison of every pair."""
    ranked = sorted(candidates, key=lambda candidate: candidate.mean)
    return ranked, [compare(better, worse) for better, worse in combinations(ranked, 2)]


def compare(better: Candidate, worse: Candidate) -> Comparison:
    """Compare the mean minima of two candidates with the same number of seeds."""
    gap = worse.mean - better.mean
    if len(better.probes) < 2:
        return Comparison(better.name, worse.name, gap, None)
    means = [mean_over_seeds([Measured(minimum, 0.0) for minimum in c.minima]) for c in (worse, better)]
    return Comparison(better.name, worse.name, gap, difference(*means))


def warnings_of(ranked: Sequence[Candidate]) -> list[str]:
    """Return what limits the ranking."""
    warnings = []
    for candidate in ranked:
        short = [str(probe.seed) for probe in candidate.probes if probe.too_short]
        if short:
            warnings.append(
                f"{candidate.name}: the loss is lowest at the last validation (seed {', '.join(short)}), so the probe "
                "is "
                "too short to reach the minimum. Raise --sft.steps."
            )
        if all(probe.step == 0 for probe in candidate.probes):
            warnings.append(
                f"{candidate.name}: no validation loss is below that of the start. Lower --sft.optimizer.lr or "
                "--sft.val_every."
            )
    if len({probe.steps for candidate in ranked for probe in candidate.probes}) > 1:
        warnings.append(
            "The probes ran for different numbers of steps (sft.epochs or sft.stop_after), so their compute is not "
            "equal."
        )
    if len(ranked[0].probes) < 2:
        warnings.append("With one seed, the effect of the seed alone is unknown. Give --seeds=0,1,2.")
    return warnings


def as_json(ranked: Sequence[Candidate], comparisons: Sequence[Comparison]) -> dict[str, Any]:
    """Return the contents of rank.json."""
    probes = [probe for candidate in ranked for probe in candidate.probes]
    return {
        "criterion": CRITERION,
        "ranking": [_row(place, candidate) for place, candidate in enumerate(ranked, 1)],
        "differences": [comparison.as_json() for comparison in comparisons],
        "warnings": warnings_of(ranked),
        "cost": {"eflops": sum(probe.eflops for probe in probes), "seconds": sum(probe.seconds for probe in probes)},
    }


def _row(place: int, candidate: Candidate) -> dict[str, Any]:
    return {
        "rank": place,
        "name": candidate.name,
        "path": candidate.path,
        "min_val_loss": candidate.mean,
        "spread": candidate.spread,
        "probes": [{**asdict(probe), "too_short": probe.too_short} for probe in candidate.probes],
    }
