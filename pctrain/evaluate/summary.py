"""From samples to figures: the scores of a model on a benchmark, their means, and what tells models apart."""

from __future__ import annotations

from collections.abc import Sequence
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


@dataclass(frozen=True)
class Scores:
    """A model on a benchmark. `rewards`: {strict, lenient and, with a judge, judged: float64 [problems, samples]}; `counts`: the rest."""

    rewards: dict[str, np.ndarray]
    counts: dict[str, float]

    @property
    def problems(self) -> int:
        return len(self.rewards["strict"])

    @property
    def samples(self) -> int:
        return self.rewards["strict"].shape[1]

    def average(self, verdict: str = "strict") -> Estimate:
        """avg@k: the mean over problems of the mean over samples."""
        return statistics.mean(self.rewards[verdict].mean(1))

    def passes(self) -> dict[int, Estimate]:
        """pass@k for k = 1, 2, 4, ... up to the samples. Partly right does not count."""
        right = (self.rewards["strict"] >= 1).sum(1)
        return {
            k: statistics.mean([statistics.pass_at_k(self.samples, int(c), k) for c in right])
            for k in statistics.powers_of_two(self.samples)
        }

    def document(self) -> dict[str, Any]:
        """The entry of results.json."""
        return {
            "problems": self.problems,
            "samples": self.samples,
            **{verdict: self.average(verdict).percent() for verdict in VERDICTS if verdict in self.rewards},
            "pass_at": {str(k): estimate.percent() for k, estimate in self.passes().items()},
            **self.counts,
        }


def read_scores(folder: Path, samples: int, judged: bool) -> Scores:
    """Of a finished samples.jsonl and its disagreements.jsonl. `judged`: a judge was named; where nothing is disputed he is not asked,
    and his column is the strict one."""
    lines = [{key: line[key] for key in ("strict", "lenient", "finish", "tokens")} for line in read(folder / SAMPLES)]
    shape = (-1, samples)
    rewards = {
        verdict: np.array([line[verdict]["reward"] for line in lines]).reshape(shape)
        for verdict in ("strict", "lenient")
    }
    disputed = list(read(folder / DISAGREEMENTS))
    counts = {
        "disagreements": len(disputed),
        "truncated_share": float(np.mean([line["finish"] == "length" for line in lines])),
        "no_box_share": float(np.mean([line["strict"]["cause"] == "no_box" for line in lines])),
        "verifier_faults": sum(
            line["strict"]["cause"] in FAULTS or line["lenient"]["cause"] in FAULTS for line in lines
        ),
        "mean_tokens": float(np.mean([line["tokens"] for line in lines])),
    }
    if judged:
        rewards["judged"] = rewards["strict"].copy()
        counts["judge_faults"] = sum(map(judge_failed, disputed))
        for line in disputed:
            if not judge_failed(line):
                rewards["judged"][line["index"], line["sample"]] = line["judged"]["reward"]
    return Scores(rewards, counts)


MEANS = {"mean": "benchmark mean", "weighted": "problem mean"}  # the paper's headline is the second


def means(by_benchmark: Sequence[Scores], verdict: str = "strict") -> dict[str, Estimate]:
    """`mean`: of the benchmarks, each counting once; `weighted`: of all problems."""
    parts = [scores.average(verdict) for scores in by_benchmark]
    return {
        "mean": statistics.combined(parts, [1] * len(parts)),
        "weighted": statistics.combined(parts, [scores.problems for scores in by_benchmark]),
    }


def differences(by_benchmark: dict[str, Scores], against: dict[str, Scores]) -> dict[str, Estimate]:
    """Paired over problems, on the same seeds: of each benchmark, and the two means."""
    parts = {
        name: statistics.difference(scores.rewards["strict"].mean(1), against[name].rewards["strict"].mean(1))
        for name, scores in by_benchmark.items()
    }
    weights = [scores.problems for scores in by_benchmark.values()]
    return {
        **parts,
        **{
            name: statistics.combined(list(parts.values()), of)
            for name, of in (("mean", [1] * len(parts)), ("weighted", weights))
        },
    }
