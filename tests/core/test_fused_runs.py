"""A run through the fused head and the same run through full logits and autograd: SFT steps, then RL steps."""

from dataclasses import replace
from unittest import mock

import numpy as np
import pytest

from tests.helpers import small

STEPS = 6


def _losses(directory, layout, fused):
    """Losses and gradient norms of `STEPS` steps of SFT, then as many of GRPO that start from one another's policy."""
    import pctrain_kernels
    from pctrain.config.tree import RLConfig
    from pctrain.rl.algorithms import registry as algorithms
    from pctrain.rl.batch import add_streams_from_pass
    from pctrain_kernels import reference

    calls = []

    def full_logits(
        hidden, weight, target, token_loss, *, grad_weight_out, group, vocab_start, sequence_parallel, rows, **options
    ):
        assert group is None and vocab_start == 0
        calls.append(1)
        return reference.linear_token_loss(hidden, weight, target, token_loss, **options)

    patch = mock.patch.object(
        pctrain_kernels, "linear_token_loss", pctrain_kernels.linear_token_loss if fused else full_logits
    )
    with patch:
        model = small.learner(directory, layout)
        updates = [small.step(model, i) for i in range(STEPS)]
        loss, rng = algorithms.build(RLConfig(algorithm="grpo"), 48).loss, np.random.default_rng(1)
        for i in range(STEPS):
            rows = [
                replace(row, streams={"advantage": np.full(len(row), rng.normal(), np.float32)})
                for row in small.rows(seed=i)
            ]
            if i % 2:  # ratios other than 1, some of them clipped
                rows, _ = add_streams_from_pass(rows, model, {"old_logprob"}, small.BUDGET, 0.7)
                rows = [
                    replace(
                        row,
                        streams={
                            **row.streams,
                            "old_logprob": row.streams["old_logprob"] + rng.normal(0, 0.3, len(row)).astype(np.float32),
                        },
                    )
                    for row in rows
                ]
            updates.append(model.train_step(model.pack(rows, small.BUDGET), loss, temperature=0.7))
    assert not (fused and calls)
    return bool(calls), [(u.loss, u.grad_norm, u.metrics.get("clip_share", 0.0)) for u in updates]


@pytest.mark.parametrize(
    "layout, world",
    [({}, 1), ({"pipeline": 2}, 2), pytest.param({}, 2, marks=pytest.mark.full)],
    ids=["single", "PP2", "DP2"],
)
@pytest.mark.parametrize("tied", [True, pytest.param(False, marks=pytest.mark.full)], ids=["tied", "untied"])
def test_losses_with_and_without_fusion_agree(ranks, hf_dirs, layout, world, tied):
    _, fused = ranks.run(_losses, hf_dirs[tied], layout, True, world=world)[-1]
    took_full_logits, unfused = ranks.run(_losses, hf_dirs[tied], layout, False, world=world)[-1]
    assert took_full_logits  # on the last pipeline stage, which has the head
    fused, unfused = np.array(fused), np.array(unfused)
    np.testing.assert_allclose(fused[:, 0], unfused[:, 0], atol=1e-5)
    np.testing.assert_allclose(
        fused[:, 1], unfused[:, 1], rtol=1e-4
    )  # fp32, another order of sums, up to 12 steps of Adam apart
    assert fused[:, 2].max() > 0.05  # some ratios were clipped
