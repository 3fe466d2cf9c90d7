"""The validation loss is one number, whatever the layout and the packing; and not the mean of batch means."""

import math

import numpy as np
import pytest
import torch
from core import small


def _validation_loss(directory, layout, rows, budget):
    from pctrain.sft.validation import validation_loss

    return validation_loss(small.core(directory, layout, train=False), rows, budget)


@pytest.fixture(scope="module")
def rows():
    return small.rows(17, seed=5)


@pytest.fixture(scope="module")
def by_transformers(hf_dirs, rows):
    """(sum of losses, number of tokens) of every trajectory, in float64, by a plain loop."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(hf_dirs[True], dtype=torch.float32)
    out = []
    for row in rows:
        ids = torch.tensor(row.tokens)[None]
        with torch.no_grad():
            logprobs = torch.log_softmax(model(ids).logits[0, :-1].double(), -1).gather(1, ids[0, 1:, None])[:, 0].numpy()
        trained = row.weights[1:] > 0
        out.append((-logprobs[trained].sum(), int(trained.sum())))
    return out


@pytest.mark.parametrize("world, layout, budget", [(1, {}, 128), (1, {}, 1024), (2, {}, 256), (2, {"pipeline": 2}, 256), (4, {"tensor": 2}, 128)],
                         ids=["one rank, small packs", "one rank, one pack", "DP2", "PP2", "TP2 x DP2"])
def test_exact_at_every_layout_and_packing(ranks, hf_dirs, rows, by_transformers, world, layout, budget):
    expected = sum(s for s, _ in by_transformers) / sum(n for _, n in by_transformers)
    for result in ranks.run(_validation_loss, hf_dirs[True], layout, rows, budget, world=world):
        assert result.loss == pytest.approx(expected, rel=1e-6)
        assert result.tokens == sum(n for _, n in by_transformers) and result.sequences == 17


def test_the_mean_of_means_is_another_number(by_transformers):
    exact = sum(s for s, _ in by_transformers) / sum(n for _, n in by_transformers)
    of_means = np.mean([s / n for s, n in by_transformers])
    assert abs(of_means - exact) > 1e-5 * exact  # ten times what the exact one is held to


def test_the_standard_error_is_that_of_repeated_draws(ranks, hf_dirs, rows, by_transformers):
    """Against a bootstrap over trajectories: the ratio estimator's formula and 4000 resamplings agree within a tenth."""
    result = ranks.run(_validation_loss, hf_dirs[True], {}, rows, 1024, world=1)[0]
    sums, counts = (np.array(column, dtype=float) for column in zip(*by_transformers, strict=True))
    rng = np.random.default_rng(0)
    draws = rng.integers(0, len(rows), (4000, len(rows)))
    bootstrap = (sums[draws].sum(1) / counts[draws].sum(1)).std()
    assert result.se == pytest.approx(bootstrap, rel=0.1 + 1 / math.sqrt(2 * len(rows)))
