"""The score on a set of problems: who is asked, how it is sampled, what its standard error is."""

import math
from dataclasses import dataclass, field

import pytest

from pctrain.config.tree import Config
from pctrain.data.problems import Problem
from pctrain.reward.verdict import Verdict
from pctrain.rollout import Completion
from pctrain.rollout.accuracy import evaluate


@dataclass
class Engine:
    """Answers with the seed, and keeps what it was asked with."""

    asked: list = field(default_factory=list)

    def generate(self, requests, **how):
        self.asked.append((requests, how))
        return [
            Completion([request.seed % 97, 1], "length" if i == 0 else "stop", None)
            for i, request in enumerate(requests)
        ]


class Words:
    def decode(self, ids):
        return str(ids[0])


class Verifier:
    """The first half of the samples of every problem is right."""

    def score(self, pairs):
        return [
            Verdict(1.0 if i % 4 < int(answer) else 0.0, "right" if i % 4 < int(answer) else "wrong", "")
            for i, (_, answer) in enumerate(pairs)
        ]


PROBLEMS = [Problem(f"p{i}", i, f"{i} + 1", [5 + i], answer, []) for i, answer in enumerate(["4", "2", "0"])]


def test_samples_are_averaged_by_problem_and_drawn_as_the_config_says():
    config = Config(eval={"samples": 4, "temperature": 0.6, "top_p": 0.95, "max_response": 9})
    engine = Engine()
    score = evaluate(engine, Verifier(), Words(), PROBLEMS, config.eval, max_response=24, seed=0)
    assert score.score == pytest.approx(50) and score.se == pytest.approx(100 * math.sqrt((0.25 + 0 + 0.25) / 3 / 3))
    assert (score.problems, score.lengths, score.truncated_share) == (3, [3] * 12, pytest.approx(1 / 12))
    [(requests, how)] = engine.asked
    assert how == {"temperature": 0.6, "top_p": 0.95, "max_response": 9}
    assert [list(request.prompt_ids) for request in requests[::4]] == [[5], [6], [7]] and len(
        {r.seed for r in requests}
    ) == 12
    evaluate(engine, Verifier(), Words(), PROBLEMS, config.eval, max_response=24, seed=0)
    assert [r.seed for r in engine.asked[1][0]] == [
        r.seed for r in requests
    ]  # checkpoints are compared on the same draws
