"""The head's gradient from the forward pass, and recomputed activations, against autograd."""

from unittest import mock

import numpy as np
import pytest

from tests.helpers import families, small

LAYOUTS = {
    "single": (1, {}),
    "TP2 with sequence parallel": (2, {"tensor": 2, "sequence_parallel": True}),
    "PP2": (2, {"pipeline": 2}),
    "PP2 with virtual stages": (2, {"pipeline": 2, "virtual_pipeline": 2}),
    "DP2": (2, {}),
}
LENGTH = 50


def _batch(packs: int):
    """Return packs of two sequences of `LENGTH` tokens, equally many per rank; one pack holds all if `packs` is 1."""
    from pctrain.data.packing import pack_rows
    from pctrain.distributed import parallel

    rank, size = parallel.data_parallel()
    rng = np.random.default_rng(0)
    rows = [
        small.make_row(rng.integers(3, 260, 5).tolist(), rng.integers(3, 260, LENGTH - 5).tolist())
        for _ in range(10 * size)
    ]
    batch = pack_rows(rows, 10 * LENGTH // packs, dp_rank=rank, dp_size=size)
    assert len(batch.packs) == packs
    return batch


def _gradient(model, batch) -> tuple[float, dict[str, np.ndarray]]:
    """Loss, and this rank's main_grad by name, reduced as far as the distributed optimizer needs it."""
    from pctrain.core import step
    from pctrain.sft.loss import cross_entropy

    for chunk in model.chunks:
        chunk.train()
        chunk.zero_grad_buffer()
    loss, _ = step.run_loss(
        model.chunks, model.head, model.spec, batch, cross_entropy, temperature=1.0, want_entropy=False, backward=True
    )
    return loss, {
        f"{i}.{name}": p.main_grad.numpy().copy()
        for i, c in enumerate(model.chunks)
        for name, p in c.module.named_parameters()
    }


def _fused_and_unfused(directory, layout, router_aux_loss=0.0):
    """{(overlap, packs): (fused, unfused)} of `_gradient`."""
    import pctrain_kernels

    fused_head = pctrain_kernels.linear_token_loss

    def unfused_head(*args, grad_weight_out, **kwargs):
        assert grad_weight_out is not None  # else both ways are one
        return fused_head(*args, **kwargs)

    found = {}
    for overlap in (False, True):
        model = small.learner(directory, {**layout, "overlap_grad_reduce": overlap}, router_aux_loss=router_aux_loss)
        for packs in (1, 5):
            fused = _gradient(model, _batch(packs))
            with mock.patch.object(pctrain_kernels, "linear_token_loss", unfused_head):
                found[overlap, packs] = fused, _gradient(model, _batch(packs))
    return found


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_heads_gradient_made_in_the_forward_pass_is_that_of_autograd(ranks, hf_dirs, layout, tied):
    world, parallel = LAYOUTS[layout]
    for rank in ranks.run(_fused_and_unfused, hf_dirs[tied], parallel, world=world):
        losses = {loss for pair in rank.values() for loss, _ in pair}
        np.testing.assert_allclose(list(losses), min(losses), rtol=1e-6)  # one batch, however it is cut
        for (overlap, packs), ((_, fused), (_, unfused)) in rank.items():
            assert any(gradient.any() for gradient in fused.values())
            _assert_close(
                fused, unfused
            )  # dW of five packs is summed in another order; everything else is the same arithmetic
            _assert_close(fused, rank[not overlap, packs][0][1])
            if (
                layout != "DP2"
            ):  # there a rank keeps the part of main_grad that is another's to reduce, and has other rows in it
                _assert_close(fused, rank[overlap, 1][0][1])


EXPERT_LAYOUTS = {
    "single": (1, {}),
    "EP2": (2, {"expert": 2}),
    "TP2 with sequence parallel": (2, {"tensor": 2, "sequence_parallel": True}),
    "PP2 with virtual stages": (2, {"pipeline": 2, "virtual_pipeline": 2}),
}


@pytest.mark.parametrize(
    "layout", [n if n in ("single", "EP2") else pytest.param(n, marks=pytest.mark.full) for n in EXPERT_LAYOUTS]
)
def test_it_is_of_a_mixture_of_experts_with_its_auxiliary_loss_too(ranks, tmp_path, layout):
    world, parallel = EXPERT_LAYOUTS[layout]
    directory = families.make("qwen3-moe", tmp_path / "model")
    for rank in ranks.run(_fused_and_unfused, directory, parallel, 0.05, world=world):
        losses = {loss for pair in rank.values() for loss, _ in pair}
        np.testing.assert_allclose(list(losses), min(losses), rtol=1e-6)
        for (overlap, packs), ((_, fused), (_, unfused)) in rank.items():
            assert any(gradient.any() for name, gradient in fused.items() if name.endswith("mlp.router.weight"))
            _assert_close(fused, unfused)
            _assert_close(
                fused, rank[not overlap, packs][0][1]
            )  # one pack is not compared with five: the auxiliary loss is of a pack


def _assert_close(gradients, expected):
    for name, gradient in expected.items():
        # fp32 sums in another order: some roundings of 6e-8 of the tensor's largest value.
        np.testing.assert_allclose(
            gradients[name], gradient, rtol=1e-5, atol=2e-6 * np.abs(gradient).max(), err_msg=name
        )


def _forward_only(directory, layout):
    """Return main_grad, filled with sevens before a forward pass and a log-prob pass."""
    from pctrain.sft.loss import cross_entropy

    model = small.learner(directory, layout)
    gradients = [p.main_grad for chunk in model.chunks for p in chunk.module.parameters()]
    for gradient in gradients:
        gradient.fill_(7)
    model.forward(_batch(5), cross_entropy, want_entropy=False)
    model.logprobs(small.rows(4), small.BUDGET)
    return [bool((gradient == 7).all()) for gradient in gradients]


@pytest.mark.parametrize(
    "world, layout", [(1, {}), (2, {"pipeline": 2, "virtual_pipeline": 2})], ids=["single", "PP2 with virtual stages"]
)
def test_forward_alone_leaves_the_gradients_untouched(ranks, hf_dirs, world, layout):
    for untouched in ranks.run(_forward_only, hf_dirs[True], layout, world=world):
        assert untouched and all(untouched)


def _recomputed(directory, layout):
    """{recompute: (loss, gradients, attention calls)}"""
    from pctrain.core.layers.packed_attention import PackedSDPA

    found, attend = {}, PackedSDPA.forward
    for recompute in ("none", "selective", "full"):
        model = small.learner(directory, {**layout, "recompute": recompute})
        calls = []

        def counted(self, *args, _calls=calls, **kwargs):
            _calls.append(1)
            return attend(self, *args, **kwargs)

        with mock.patch.object(PackedSDPA, "forward", counted):
            found[recompute] = (*_gradient(model, _batch(2)), len(calls))
    return found


@pytest.mark.parametrize(
    "world, layout",
    [(1, {}), (2, {"tensor": 2, "sequence_parallel": True}), (2, {"pipeline": 2})],
    ids=["single", "TP2 with sequence parallel", "PP2"],
)
def test_recomputed_activations_give_the_same_gradients(ranks, hf_dirs, world, layout):
    for rank in ranks.run(_recomputed, hf_dirs[True], layout, world=world):
        loss, gradients, calls = rank["none"]
        for recompute in ("selective", "full"):
            assert rank[recompute][0] == loss
            assert rank[recompute][2] == 2 * calls > 0
            for name, gradient in gradients.items():
                np.testing.assert_array_equal(rank[recompute][1][name], gradient, err_msg=name)
