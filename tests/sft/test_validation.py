"""The validation loss is one number, whatever the layout and the packing; and not the mean of batch means."""

import math

import numpy as np
import pytest
import torch

from pctrain.config.tree import SourceConfig
from pctrain.data.trajectories import Trajectories
from tests.helpers import small


class Stored(list):
    """Rows in place of a TokenStore."""

    @property
    def lengths(self):
        return np.array([len(row) for row in self], np.int32)

    @property
    def loss_tokens(self):
        return np.array([int((row.weights > 0).sum()) for row in self], np.int32)


def _trajectories(rows, sources=1):
    """The rows as the trajectories of so many sources, cut where the index says so."""
    parts = [part.tolist() for part in np.array_split(np.arange(len(rows)), sources)]
    return Trajectories(
        [SourceConfig(path=f"{name}.jsonl") for name in "abc"[:sources]],
        [Stored(rows[i] for i in part) for part in parts],
    )


def _validation_loss(directory, layout, rows, budget, sources=1, packs=16):
    from unittest import mock

    from pctrain.sft import validation

    with mock.patch.object(validation, "PACKS", packs):
        return validation.validation_loss(
            small.learner(directory, layout, train=False), _trajectories(rows, sources), budget
        )


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
            logprobs = (
                torch.log_softmax(model(ids).logits[0, :-1].double(), -1).gather(1, ids[0, 1:, None])[:, 0].numpy()
            )
        trained = row.weights[1:] > 0
        out.append((-logprobs[trained].sum(), int(trained.sum())))
    return out


@pytest.mark.parametrize(
    "world, layout, budget, packs",
    [
        pytest.param(1, {}, 128, 16, id="one rank, small packs"),
        pytest.param(1, {}, 128, 1, id="a pack at a time"),
        pytest.param(1, {}, 1024, 16, id="one rank, one pack"),
        pytest.param(2, {}, 256, 1, id="DP2"),
        pytest.param(2, {"tensor": 2}, 128, 2, id="TP2"),
        pytest.param(2, {"pipeline": 2}, 256, 16, id="PP2"),
        pytest.param(4, {}, 256, 16, id="DP4"),
        pytest.param(4, {"tensor": 2}, 128, 16, id="TP2 x DP2"),
    ],
)
def test_exact_at_every_layout_and_packing(ranks, hf_dirs, rows, by_transformers, world, layout, budget, packs):
    expected = sum(s for s, _ in by_transformers) / sum(n for _, n in by_transformers)
    for result in ranks.run(_validation_loss, hf_dirs[True], layout, rows, budget, 1, packs, world=world):
        assert result.whole.loss == pytest.approx(expected, rel=1e-6)
        assert result.whole.tokens == sum(n for _, n in by_transformers) and result.sequences == 17
        assert result.per_sample.loss == pytest.approx(np.mean([s / n for s, n in by_transformers]), rel=1e-6)
        assert "val_loss/a" not in result.metrics()  # one source


def test_each_source_has_its_own(ranks, hf_dirs, rows, by_transformers):
    for result in ranks.run(_validation_loss, hf_dirs[True], {}, rows, 256, 2, world=2):
        assert list(result.sources) == ["a", "b"]
        for name, part in zip("ab", (by_transformers[:9], by_transformers[9:]), strict=True):
            expected = sum(s for s, _ in part) / sum(n for _, n in part)
            assert result.sources[name].loss == pytest.approx(expected, rel=1e-6)
            assert (
                result.metrics()[f"val_loss/{name}"] == result.sources[name].loss
                and result.metrics()[f"val_loss_se/{name}"] > 0
            )
        assert result.whole.tokens == sum(mean.tokens for mean in result.sources.values())


def test_the_mean_of_means_is_another_number(by_transformers):
    exact = sum(s for s, _ in by_transformers) / sum(n for _, n in by_transformers)
    of_means = np.mean([s / n for s, n in by_transformers])
    assert abs(of_means - exact) > 1e-5 * exact  # ten times what the exact one is held to


def test_the_standard_error_is_that_of_repeated_draws(ranks, hf_dirs, rows, by_transformers):
    """Against a bootstrap over trajectories: the formulas and 4000 resamplings agree within a tenth."""
    result = ranks.run(_validation_loss, hf_dirs[True], {}, rows, 1024, world=1)[0]
    sums, counts = (np.array(column, dtype=float) for column in zip(*by_transformers, strict=True))
    draws = np.random.default_rng(0).integers(0, len(rows), (4000, len(rows)))
    tolerance = 0.1 + 1 / math.sqrt(2 * len(rows))
    assert result.whole.se == pytest.approx((sums[draws].sum(1) / counts[draws].sum(1)).std(), rel=tolerance)
    assert result.per_sample.se == pytest.approx((sums / counts)[draws].mean(1).std(), rel=tolerance)
