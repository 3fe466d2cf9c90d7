"""Accuracy of the engine's weights on a set of problems: sample, verify, average."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass

import numpy as np

from pctrain.config.tree import EvalConfig
from pctrain.data.problems import Problem
from pctrain.distributed import parallel
from pctrain.hf.tokenizer import Tokenizer
from pctrain.reward import VerifierPool, cause_counts, fault_line
from pctrain.reward.verdict import FAULTS
from pctrain.rollout.engine import RolloutEngine
from pctrain.rollout.queue import Request
from pctrain.rollout.seeds import sampling_seed


@dataclass(frozen=True)
class Score:
    """Accuracy in percent: the mean over problems of the mean over samples, with its standard error over problems.

    `lengths` has the tokens of each sequence (prompt and response), `causes` the number of verdicts of each cause under
    `verdicts/<cause>`, and `faults` the line for train.log if the verifier failed on a response.
    """

    score: float
    se: float
    problems: int
    truncated_share: float
    no_box_share: float
    lengths: list[int]
    seconds: float
    causes: dict[str, int]
    faults: str | None

    def metrics(self) -> dict[str, float]:
        """Return the values for metrics.jsonl."""
        return {
            "score": self.score,
            "score_se": self.se,
            "problems": self.problems,
            "truncated_share": self.truncated_share,
            "no_box_share": self.no_box_share,
            "verifier_faults": sum(self.causes[f"verdicts/{cause}"] for cause in FAULTS),
            **self.causes,
            "time/eval_seconds": self.seconds,
        }


def evaluate(
    engine: RolloutEngine,
    verifier: VerifierPool,
    tokenizer: Tokenizer,
    problems: list[Problem],
    sampling: EvalConfig,
    *,
    max_response: int,
    seed: int,
) -> Score:
    """Return the accuracy of the weights that the engine holds. Collective.

    `max_response`, in tokens, is used where `sampling` has none. The seeds do not depend on the training step: two
    evaluations of one model give the same score, and checkpoints are compared on the same draws.
    """
    began = time.perf_counter()
    samples = sampling.samples
    requests = [
        Request(problem.prompt_ids, sampling_seed(seed, "eval", 0, problem.index, sample))
        for problem in problems
        for sample in range(samples)
    ]
    completions = engine.generate(
        requests,
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        max_response=sampling.max_response or max_response,
    )
    answers = [problem.answer for problem in problems for _ in range(samples)]
    verdicts = parallel.map_over_ranks(
        verifier.score,
        [(tokenizer.decode(c.token_ids), answer) for c, answer in zip(completions, answers, strict=True)],
    )
    accuracy = np.array([verdict.reward for verdict in verdicts]).reshape(len(problems), samples).mean(1)
    # With one sample per problem this is the binomial standard error.
    standard_error = math.sqrt(float(accuracy.var()) / len(problems))
    return Score(
        score=100 * float(accuracy.mean()),
        se=100 * standard_error,
        problems=len(problems),
        truncated_share=float(np.mean([c.finish == "length" for c in completions])),
        no_box_share=float(np.mean([verdict.cause == "no_box" for verdict in verdicts])),
        lengths=[len(r.prompt_ids) + len(c.token_ids) for r, c in zip(requests, completions, strict=True)],
        seconds=time.perf_counter() - began,
        causes=cause_counts(verdicts),
        faults=fault_line(verdicts),
    )
