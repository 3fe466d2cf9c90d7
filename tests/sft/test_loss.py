"""The loss of each source, and losses that stand out."""

import numpy as np
import pytest
import torch

from pctrain.data.trajectories import SOURCE
from pctrain.sft.loss import cross_entropy, cross_entropy_by_source, source_means
from pctrain.sft.spikes import FEWEST, Spikes


def test_each_source_gets_the_mean_over_its_own_tokens():
    torch.manual_seed(0)
    logprob, source = -torch.rand(50), torch.randint(0, 3, (50,)).float()
    source[source == 1] = 2  # nothing of b in this batch
    loss, metrics = cross_entropy_by_source(["a", "b", "c"])(logprob, None, {SOURCE: source})
    assert torch.equal(loss, cross_entropy(logprob, None, {})[0])
    means = {
        key: float(value.mean()) for key, value in metrics.items()
    }  # what the learner reports for a metric, all weights 1
    found = source_means({**means, "other": 5.0}, ["a", "b", "c"], [int((source == i).sum()) for i in range(3)])
    assert found == {
        "other": 5.0,
        "loss/a": pytest.approx(-float(logprob[source == 0].mean())),
        "loss/c": pytest.approx(-float(logprob[source == 2].mean())),
    }


def test_a_single_source_has_no_separate_loss():
    assert cross_entropy_by_source(["a"]) is cross_entropy
    assert source_means({"x": 1.0}, ["a"], [10]) == {"x": 1.0}


def run(losses):
    spikes = Spikes()
    return [i for i, loss in enumerate(losses) if spikes.add(float(loss))]


@pytest.mark.parametrize("seed", range(20))
def test_a_falling_noisy_curve_has_no_spikes_and_a_jump_is_one(seed):
    rng = np.random.default_rng(seed)
    losses = 0.4 + 2 * np.exp(-np.arange(400) / 60) + rng.normal(0, 0.03, 400)
    assert run(losses) == []
    losses[[150, 151, 300]] += 1.0
    assert run(losses) == [150, 151, 300]  # a row of them does not become normal


def test_spikes_wait_for_a_window_and_a_flat_curve_has_room():
    assert run([1.0, 50.0, 1.0]) == []
    assert run([1.0] * FEWEST + [1.04, 1.06]) == [FEWEST + 1]
    assert run([1.0, float("nan")]) == [1]


def test_the_window_survives_a_resume():
    losses = [*np.random.default_rng(0).normal(1, 0.1, 70), 9.0]
    first = Spikes()
    for loss in losses[:60]:
        first.add(loss)
    second = Spikes(first.state())
    assert [second.add(loss) for loss in losses[60:]] == [first.add(loss) for loss in losses[60:]] and len(
        second.state()
    ) == 50
