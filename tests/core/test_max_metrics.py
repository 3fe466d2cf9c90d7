"""Metrics that are maxima, over packs and ranks, at any layout."""

import math
from dataclasses import replace

import numpy as np
import pytest

from tests.helpers import small


def _metrics(directory, layout):
    """Metrics of a forward pass and of a step; the largest values stand on tokens of which one has weight 0."""
    model = small.learner(directory, layout)
    rng = np.random.default_rng(0)
    rows = [
        replace(row, streams={"value": -1 - rng.random(len(row)).astype(np.float32)})  # all below 0
        for row in small.rows()
    ]
    rows[7].streams["value"][-1] = -0.5
    rows[9].streams["value"][-1] = 5.0
    rows[9].weights[-1] = 0.0

    def loss(logprob, entropy, streams):
        return -logprob, {"value": streams["value"], "max/value": streams["value"], "max/nll": -logprob.detach()}

    batch = model.pack(rows, small.BUDGET)
    _, forward = model.forward(batch, loss, want_entropy=False)
    update = model.train_step(batch, loss, want_entropy=False)
    return forward, update.metrics


@pytest.mark.parametrize(
    "layout, world", [({}, 2), ({"tensor": 2}, 2), ({"pipeline": 2}, 2)], ids=["DP2", "TP2", "PP2"]
)
def test_the_maximum_is_over_all_packs_and_ranks(ranks, hf_dirs, layout, world):
    ((alone, _),) = ranks.run(_metrics, hf_dirs[True], {}, world=1)
    assert (
        alone["max/value"] == -0.5 and alone["value"] < -1 and math.isfinite(alone["max/nll"]) and alone["max/nll"] > 5
    )
    for forward, trained in ranks.run(_metrics, hf_dirs[True], layout, world=world):
        assert forward["max/value"] == trained["max/value"] == -0.5
        for name in ("value", "max/nll"):
            assert forward[name] == pytest.approx(alone[name], rel=1e-5) == pytest.approx(trained[name], rel=1e-5)
