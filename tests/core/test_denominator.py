"""A caller's denominator divides loss and gradients, the sum of the weights divides metrics; `optimizer.skip_above`."""

import numpy as np
import pytest

from pctrain.common.errors import UserError
from pctrain.core import Update
from pctrain.core.skipped import SkippedUpdates
from tests.helpers import small

LAYOUTS = {"single": (1, {}), "TP2": (2, {"tensor": 2}), "PP2": (2, {"pipeline": 2}), "DP2": (2, {})}


def _loss(logprob, entropy, streams):
    return -logprob, {"entropy": entropy.detach()}


def _step(directory, layout, factor):
    """Return the results of forward and step for one batch whose denominator is loss_tokens x factor."""
    model, rows = small.learner(directory, layout), small.rows(12)
    tokens = float(sum(row.weights.sum() for row in rows))
    batch = model.pack(rows, small.BUDGET, denominator=None if factor == 1 else factor * tokens)
    forward = model.forward(batch, _loss)
    update = model.train_step(batch, _loss)
    return batch.loss_tokens, batch.denominator, forward, (update.loss, update.metrics, update.grad_norm)


@pytest.mark.parametrize("world, layout", LAYOUTS.values(), ids=LAYOUTS)
def test_loss_and_gradient_are_divided_by_it_and_metrics_are_not(ranks, hf_dirs, world, layout):
    plain = ranks.run(_step, hf_dirs[True], layout, 1, world=world)
    scaled = ranks.run(_step, hf_dirs[True], layout, 4.0, world=world)
    for (tokens, one, forward, (loss, metrics, norm)), (_, four, forward4, (loss4, metrics4, norm4)) in zip(
        plain, scaled, strict=True
    ):
        assert one == tokens and four == 4 * tokens
        assert (loss4, norm4) == pytest.approx((loss / 4, norm / 4), rel=1e-5) and norm > 0.1
        assert metrics4 == pytest.approx(metrics, rel=1e-6) and metrics["entropy"] > 1
        assert forward[0] == pytest.approx(loss, rel=1e-5) and forward4[0] == pytest.approx(loss / 4, rel=1e-5)
        assert forward4[1] == pytest.approx(metrics, rel=1e-5)


def _skip(directory, layout):
    model = small.learner(directory, layout, optimizer=small.OPTIMIZER.model_copy(update={"skip_above": 1e-6}))
    before = [p.detach().clone() for m in model.modules for p in m.parameters()]
    update = small.step(model, 0)
    return update, all(
        (a == b.detach()).all() for a, b in zip(before, (p for m in model.modules for p in m.parameters()), strict=True)
    )


def test_an_update_with_too_large_a_gradient_is_skipped(ranks, hf_dirs):
    for update, same in ranks.run(_skip, hf_dirs[True], {"tensor": 2}, world=2):
        assert update.skipped and same and np.isfinite(update.grad_norm) and update.grad_norm > 1e-6


def test_too_many_of_them_stop_the_run_with_the_cause():
    skipped = SkippedUpdates(limit=2)
    update = Update(1.0, {}, 90.0, 0.1, skipped=True)
    skipped.add(update, 3, ["p1"])
    with pytest.raises(
        UserError,
        match=r"step 4: the gradient norm is 90, above optimizer.skip_above, and 2 updates in a row were skipped",
    ):
        skipped.add(update, 4, ["p2"])
