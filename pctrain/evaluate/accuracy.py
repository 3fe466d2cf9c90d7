"""Accuracy on a set of problems, by sampling and verifying."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass

import numpy as np

from pctrain.config.tree import Config
from pctrain.data.problems import Problem
from pctrain.distributed import parallel
from pctrain.hf.tokenizer import Tokenizer
from pctrain.reward import VerifierPool, cause_counts, fault_line
from pctrain.reward.verdict import FAULTS
from pctrain.rollout import Request, RolloutEngine, sampling_seed


@dataclass(frozen=True)
class Score:
    """Mean over problems of the mean over samples, in percent; `se`: standard error over problems, in percent.

    `causes`: how many verdicts of each cause, `verdicts/<cause>`; `faults`: the line for train.log where the verifier failed.
    """

    score: float
    se: float
    problems: int
    truncated_share: float
    no_box_share: float
    lengths: list[int]  # of each sequence, prompt and response, tokens
    seconds: float
    causes: dict[str, int]
    faults: str | None

    def metrics(self) -> dict[str, float]:
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
    engine: RolloutEngine, verifier: VerifierPool, tokenizer: Tokenizer, problems: list[Problem], config: Config
) -> Score:
    """Scores the weights that the engine holds. Collective.

    The seeds do not depend on the step: two evaluations of one model give one number, and checkpoints are compared on the same draws.
    """
    began = time.perf_counter()
    samples = config.eval.samples
    requests = [
        Request(p.prompt_ids, sampling_seed(config.run.seed, "eval", 0, p.index, sample))
        for p in problems
        for sample in range(samples)
    ]
    completions = engine.generate(
        requests,
        temperature=config.eval.temperature,
        top_p=config.eval.top_p,
        max_response=config.eval.max_response or config.rollout.max_response,
    )
    answers = [p.answer for p in problems for _ in range(samples)]
    verdicts = parallel.map_over_ranks(
        verifier.score,
        [(tokenizer.decode(c.token_ids), answer) for c, answer in zip(completions, answers, strict=True)],
    )
    right = np.array([v.reward for v in verdicts]).reshape(len(problems), samples).mean(1)
    n = len(problems)
    # With one sample a problem this is the binomial standard error.
    se = math.sqrt(float(right.var()) / n)
    return Score(
        score=100 * float(right.mean()),
        se=100 * se,
        problems=n,
        truncated_share=float(np.mean([c.finish == "length" for c in completions])),
        no_box_share=float(np.mean([v.cause == "no_box" for v in verdicts])),
        lengths=[len(r.prompt_ids) + len(c.token_ids) for r, c in zip(requests, completions, strict=True)],
        seconds=time.perf_counter() - began,
        causes=cause_counts(verdicts),
        faults=fault_line(verdicts),
    )
