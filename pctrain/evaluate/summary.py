"""From samples to figures: the scores of a model on a benchmark, their means, and the differences between models."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pctrain.evaluate import statistics
from pctrain.evaluate.disagreements import DISAGREEMENTS, judge_failed
from pctrain.evaluate.samples import SAMPLES, read
from pctrain.evaluate.statistics import Estimate
from pctrain.reward.verdict import FAULTS

VERDICTS = ("strict", "lenient", "judged")
MEANS = {"mean": "benchmark mean", "weighted": "problem mean"}  # arXiv 2512.11470's headline is the second


@dataclass(frozen=True)
class Scores:
    """The scores of a model on a benchmark.

    `rewards`: {strict, lenient and, with a judge, judged: float64 [problems, samples]}. `counts`: all other figures.
    """

    rewards: dict[str, np.ndarray]
    counts: dict[str, float]

    @property
    def problems(self) -> int:
        """Number of problems."""
        return len(self.rewards["strict"])

    @property
    def samples(self) -> int:
        """Number of samples per problem."""
        return self.rewards["strict"].shape[1]

    def average(self, verdict: str = "strict") -> Estimate:
        """Return avg@k: the mean over problems of the mean over samples."""
        return statistics.mean(self.rewards[verdict].mean(1))

    def passes(self) -> dict[int, Estimate]:
        """Return pass@k for k = 1, 2, 4, ... up to the number of samples. A partly right answer does not count."""
        right = (self.rewards["strict"] >= 1).sum(1)
        return {
            k: statistics.mean([statistics.pass_at_k(self.samples, int(c), k) for c in right])
            for k in statistics.powers_of_two(self.samples)
        }

    def document(self) -> dict[str, Any]:
        """Return the entry of results.json."""
        return {
            "problems": self.problems,
            "samples": self.samples,
            **{verdict: self.average(verdict).percent() for verdict in VERDICTS if verdict in self.rewards},
            "pass_at": {str(k): estimate.percent() for k, estimate in self.passes().items()},
            **self.counts,
        }


def read_scores(folder: Path, samples: int, judged: bool) -> Scores:
    """Return the scores of a complete samples.jsonl and its disagreements.jsonl.

    `judged`: a judge was named. He is only asked about disputed samples, so his column is the strict one elsewhere.
    """
    lines = [{key: line[key] for key in ("strict", "lenient", "finish", "tokens")} for line in read(folder / SAMPLES)]
    rewards = {
        verdict: np.array([line[verdict]["reward"] for line in lines]).reshape(-1, samples)
        for verdict in ("strict", "lenient")
    }
    disputed = list(read(folder / DISAGREEMENTS))
    faults = [line["strict"]["cause"] in FAULTS or line["lenient"]["cause"] in FAULTS for line in lines]
    counts = {
        "disagreements": len(disputed),
        "truncated_share": float(np.mean([line["finish"] == "length" for line in lines])),
        "no_box_share": float(np.mean([line["strict"]["cause"] == "no_box" for line in lines])),
        "verifier_faults": sum(faults),
        "mean_tokens": float(np.mean([line["tokens"] for line in lines])),
    }
    if judged:
        rewards["judged"] = rewards["strict"].copy()
        counts["judge_faults"] = sum(map(judge_failed, disputed))
        for line in disputed:
            if not judge_failed(line):
                rewards["judged"][line["index"], line["sample"]] = line["judged"]["reward"]
    return Scores(rewards, counts)


def means(by_benchmark: Sequence[Scores], verdict: str = "strict") -> dict[str, Estimate]:
    """Return `mean`, over benchmarks that count once each, and `weighted`, over all problems."""
    return _both_means([scores.average(verdict) for scores in by_benchmark], by_benchmark)


def differences(by_benchmark: Mapping[str, Scores], against: Mapping[str, Scores]) -> dict[str, Estimate]:
    """Return the differences to another model for each benchmark and both means, paired over problems and seeds."""
    parts = {
        name: statistics.difference(scores.rewards["strict"].mean(1), against[name].rewards["strict"].mean(1))
        for name, scores in by_benchmark.items()
    }
    return {**parts, **_both_means(list(parts.values()), list(by_benchmark.values()))}


def _both_means(parts: Sequence[Estimate], by_benchmark: Sequence[Scores]) -> dict[str, Estimate]:
    """Return the two means of one estimate per benchmark."""
    return {
        "mean": statistics.combined(parts, [1] * len(parts)),
        "weighted": statistics.combined(parts, [scores.problems for scores in by_benchmark]),
    }
