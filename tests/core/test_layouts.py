"""Whatever the layout, the run is the same run."""

import numpy as np
import pytest

from tests.helpers import small

LAYOUTS = {
    "TP2": (2, {"tensor": 2}),
    "TP2 with sequence parallel": (2, {"tensor": 2, "sequence_parallel": True}),
    "PP2": (2, {"pipeline": 2}),
    "DP2": (2, {}),
    "PP2 with virtual stages": (2, {"pipeline": 2, "virtual_pipeline": 2}),
    "PP2 of 1 and 3 layers": (2, {"pipeline": 2, "first_stage_layers": 1}),
    "TP2 x PP2": (4, {"tensor": 2, "pipeline": 2}),
    "TP2 x PP2 of 3 and 1 layers, sequence parallel": (
        4,
        {"tensor": 2, "sequence_parallel": True, "pipeline": 2, "last_stage_layers": 1},
    ),
    "PP2 x DP2 with virtual stages, reductions overlapped": (
        4,
        {"pipeline": 2, "virtual_pipeline": 2, "overlap_grad_reduce": True},
    ),
    "TP2 x DP2 with sequence parallel": (4, {"tensor": 2, "sequence_parallel": True}),
    "TP2 x PP2 with virtual stages and sequence parallel": (
        4,
        {"tensor": 2, "sequence_parallel": True, "pipeline": 2, "virtual_pipeline": 2},
    ),
}
STEPS = 20


@pytest.fixture(scope="module")
def single(ranks, hf_dirs):
    """{tied: the run of one process}."""
    return {tied: ranks.run(small.train, hf_dirs[tied], {}, STEPS, world=1)[0] for tied in (True, False)}


# In the fast tier every layout once: tied where stages share the embedding's gradient, and untied in two of these.
FAST_TIED = {name for name, (_, parallel) in LAYOUTS.items() if "pipeline" in parallel} - {
    "PP2 of 1 and 3 layers",
    "PP2 x DP2 with virtual stages, reductions overlapped",
}


@pytest.mark.parametrize(
    ("layout", "tied"),
    [
        pytest.param(
            name,
            tied,
            id=f"{name}-{'tied' if tied else 'untied'}",
            marks=() if tied == (name in FAST_TIED) else pytest.mark.full,
        )
        for name in LAYOUTS
        for tied in (True, False)
    ],
)
def test_losses_gradient_norms_and_weights_equal_those_of_one_process(ranks, hf_dirs, single, layout, tied):
    world, parallel = LAYOUTS[layout]
    results = ranks.run(small.train, hf_dirs[tied], parallel, STEPS, world=world)
    for result in results:
        # fp32 sums in another order; 20 steps of Adam at a high learning rate amplify 1e-7 to below 1e-5.
        np.testing.assert_allclose(result["loss"], single[tied]["loss"], rtol=1e-5)
        np.testing.assert_allclose(result["grad_norm"], single[tied]["grad_norm"], rtol=1e-4)
    # It trains, so the comparison is meaningful (random tokens teach only which 257 of 290 ids occur, 0.12 nats).
    assert single[tied]["loss"][-1] < single[tied]["loss"][0] - 0.05
    for name, weight in single[tied]["weights"].items():
        # A step of Adam is 1e-3 here at any size of gradient, so rounding of a tiny gradient shows: 1.3e-6 measured.
        np.testing.assert_allclose(results[0]["weights"][name], weight, rtol=0, atol=5e-6, err_msg=name)


def test_every_rank_reports_the_same(ranks, hf_dirs):
    first, *others = ranks.run(small.train, hf_dirs[True], {"tensor": 2, "pipeline": 2}, 3, world=4)
    for other in others:
        assert other["loss"] == first["loss"] and other["grad_norm"] == first["grad_norm"]
        assert all(np.array_equal(other["weights"][name], first["weights"][name]) for name in first["weights"])
