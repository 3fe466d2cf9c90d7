"""A loss or gradient that is not finite: no rank updates, the run continues, and stops if it happens too often."""

import json
import math

import numpy as np
import pytest

from pctrain.common.errors import UserError
from pctrain.core import Update
from pctrain.core.skipped import SkippedUpdates
from tests.helpers import small, tiny

BAD = 1.0  # value of the stream `bad` on the row that spoils a batch


def _nan_loss(logprob, entropy, streams):
    return -logprob + streams["bad"] * math.nan if streams["bad"].any() else -logprob, {}


def _nan_gradient(logprob, entropy, streams):
    """The loss is finite, its derivative is not: that of the root at 0."""
    return -logprob + (logprob * 0).sqrt() * streams["bad"], {}


def _spoiled(directory, layout, kind):
    """Return (update, weights and optimizer unchanged) of a good, a spoiled and a good step, and the final weights."""
    model = small.learner(directory, layout)
    token_loss = {"loss": _nan_loss, "gradient": _nan_gradient}[kind]

    def state():
        moments = [
            value.clone()
            for s in model.optimizer.chained_optimizers[0].optimizer.state.values()
            for value in s.values()
        ]
        return [p.detach().clone() for c in model.chunks for p in c.module.parameters()] + moments

    found = []
    for spoiled in (False, True, False):
        bad = [BAD if spoiled and i == 3 else 0.0 for i in range(24)]
        rows = [
            small.make_row(row.tokens[:5], row.tokens[5:], {"bad": b})
            for row, b in zip(small.rows(24), bad, strict=True)
        ]
        batch = model.pack(rows, small.BUDGET)
        before = state()
        update = model.train_step(
            batch, token_loss if spoiled else lambda logprob, entropy, streams: (-logprob, {}), want_entropy=False
        )
        after = state()
        same = len(before) == len(after) and all((a == b).all() for a, b in zip(before, after, strict=True))
        found.append((update, bool(same)))
    return found, {name: tensor.numpy().copy() for name, tensor in model.hf_weights()}


@pytest.mark.parametrize("kind", ["loss", "gradient"])
@pytest.mark.parametrize(
    "world, layout",
    [(1, {}), (2, {"tensor": 2}), (2, {"pipeline": 2}), (2, {"overlap_grad_reduce": True})],
    ids=["single", "TP2", "PP2", "DP2"],
)
def test_one_bad_row_skips_the_update_on_every_rank(ranks, hf_dirs, world, layout, kind):
    results = ranks.run(_spoiled, hf_dirs[True], layout, kind, world=world)
    for found, weights in results:
        (first, _), (skipped, left_alone), (last, changed_nothing) = found
        assert skipped.skipped and left_alone and math.isnan(skipped.grad_norm)
        assert math.isfinite(skipped.loss) == (kind == "gradient")
        # The next step is as good as any, and the schedule advanced: linear warm-up over 5 steps.
        assert (
            not first.skipped
            and not last.skipped
            and not changed_nothing
            and math.isfinite(last.loss)
            and math.isfinite(last.grad_norm)
        )
        assert [u.lr for u, _ in found] == pytest.approx([small.OPTIMIZER.lr * i / 5 for i in (1, 2, 3)])
        assert all(np.isfinite(w).all() and np.array_equal(w, results[0][1][name]) for name, w in weights.items())


def _update(skipped):
    return Update(
        loss=math.nan if skipped else 1.0, metrics={}, grad_norm=math.nan if skipped else 1.0, lr=1e-3, skipped=skipped
    )


def test_only_skips_in_a_row_stop_the_run():
    count = SkippedUpdates(limit=3)
    for step, skipped in enumerate([True, True, False, True, True], start=1):
        count.add(_update(skipped), step, ["a"])
    resumed = SkippedUpdates(limit=3, in_a_row=count.in_a_row)
    with pytest.raises(UserError, match=r"step 6.*3 updates in a row.*max_skipped.*: x\.jsonl:7, x\.jsonl:9$"):
        resumed.add(_update(True), 6, ["x.jsonl:7", "x.jsonl:9", "x.jsonl:7"])


def test_a_diverged_run_stops_and_names_the_last_samples(ranks, tmp_path):
    options = [
        *tiny.OPTIONS,
        "--sft.steps=20",
        "--sft.batch_size=4",
        "--sft.val_every=20",
        "--sft.eval_every=0",
        "--sft.optimizer.warmup=0",
        "--sft.optimizer.lr=1e30",
        "--sft.optimizer.max_skipped=2",
        f"--run.dir={tmp_path}/run",
    ]
    [(status, errors)] = ranks.run(tiny.cli, "sft", *options, world=1)
    assert status == 2 and "Traceback" not in errors and "2 updates in a row" in errors, errors
    lines = (tmp_path / "run" / "data" / "train.jsonl").read_text().splitlines()
    ids = {json.loads(line).get("id", f"train.jsonl:{i}") for i, line in enumerate(lines, start=1)}
    named = errors.strip().split(": ")[-1].split(", ")
    assert len(named) == 4 and set(named) <= ids, errors
    skipped = [line["skipped_updates"] for line in tiny.metrics(tmp_path / "run", "train")]
    assert skipped[0] == 0 and skipped[-2:] == [1, 1] and len(skipped) < 20
