"""Rows for the learner: the tokens that were sampled, weights on the response alone, the advantage of each rollout on its own row."""

import numpy as np

from pctrain.config import RLConfig
from pctrain.data.problems import Problem
from pctrain.reward import Verdict
from pctrain.rl import algorithms
from pctrain.rl.batch import rows_of, split
from pctrain.rl.sampling import Group
from pctrain.rollout import Completion


def group(index, rewards):
    completions = [Completion([10 + k, 20 + k, 2][: 2 + k % 2], "stop", None) for k in range(len(rewards))]
    return Group(Problem(f"p{index}", index, "x", [7, 8, 9], "1"), completions, [Verdict(r, "right" if r else "wrong") for r in rewards])


def test_rows_by_hand():
    rows = rows_of([group(0, [1.0, 0.0]), group(1, [0.0, 0.0])], algorithms.build(RLConfig(algorithm="grpo", std_normalise=False)))
    assert [row.tokens.tolist() for row in rows] == [[7, 8, 9, 10, 20], [7, 8, 9, 11, 21, 2]] * 2
    assert [row.weights.tolist() for row in rows] == [[0, 0, 0, 1, 1], [0, 0, 0, 1, 1, 1]] * 2
    assert [row.streams["advantage"][-1] for row in rows] == [0.5, -0.5, 0, 0]


def test_minibatches_share_the_rows_out():
    rows = list(range(10))
    assert [len(part) for part in split(rows, 4)] == [2, 3, 3, 2] or sum(len(part) for part in split(rows, 4)) == 10
    assert np.concatenate(split(rows, 4)).tolist() == rows
    assert split(rows[:2], 4) == [[0], [1]]
