"""The reference model: the weights a run started from, sharded like the trained ones, and gone again after its pass."""

import numpy as np
import pytest

from pctrain.distributed import parallel
from tests.helpers import small

LAYOUTS = {
    "single": (1, {}), "TP2": (2, {"tensor": 2}), "PP2": (2, {"pipeline": 2}), "DP2": (2, {}),
    "TP2 x PP2": (4, {"tensor": 2, "sequence_parallel": True, "pipeline": 2}),
}  # fmt: skip


def _weights(model):
    return [parameter.detach().clone() for module in model.modules for parameter in module.parameters()]


def _reference_logprobs(model, rows):
    with model.reference():
        return model.logprobs(rows, small.BUDGET)


def _follow(directory, layout):
    """Return log-probs of model and reference at the start and after 3 steps, and if passes left the weights alone."""
    model, rows = small.learner(directory, layout), small.rows(10, seed=5)
    model.keep_reference()
    start, first = model.logprobs(rows, small.BUDGET), _reference_logprobs(model, rows)
    for i in range(3):
        small.step(model, i)
    trained, before = model.logprobs(rows, small.BUDGET), _weights(model)
    later, again = _reference_logprobs(model, rows), model.logprobs(rows, small.BUDGET)
    try:
        with model.reference():
            raise KeyError("of the caller")
    except KeyError:
        pass
    same = all((a == b).all() for a, b in zip(before, _weights(model), strict=True))
    update = small.step(model, 3)  # and it still trains
    return start, first, trained, later, again, bool(same), update.loss


@pytest.mark.parametrize("world, layout", LAYOUTS.values(), ids=LAYOUTS)
def test_the_reference_stays_at_the_start(ranks, hf_dirs, world, layout):
    for start, first, trained, later, again, same, loss in ranks.run(_follow, hf_dirs[True], layout, world=world):
        for row in range(len(start)):
            assert np.array_equal(first[row], start[row])  # the first KL is 0
            assert np.array_equal(later[row], start[row])
            assert np.array_equal(again[row], trained[row])
            assert np.abs(trained[row] - start[row]).max() > 1e-2
        assert same and np.isfinite(loss)


def _resumed(directory, checkpoint, folder):
    """Save a run from `checkpoint` after 2 steps and load it; return log-probs of its start and of the reference."""
    model, rows = small.learner(directory, {}, checkpoint=checkpoint), small.rows(6, seed=5)
    start = model.logprobs(rows, small.BUDGET)
    for i in range(2):
        small.step(model, i)
    if parallel.rank() == 0:
        folder.mkdir()
    parallel.barrier()
    model.save(folder)
    second = small.learner(directory, {}, checkpoint=checkpoint)
    second.load(folder)
    second.keep_reference()
    resumed = second.logprobs(rows, small.BUDGET)
    return start, resumed, model.logprobs(rows, small.BUDGET), _reference_logprobs(second, rows)


@pytest.mark.parametrize("from_checkpoint", [False, True])
def test_after_a_resume_the_reference_is_the_start_of_the_run(ranks, hf_dirs, tmp_path, from_checkpoint):
    checkpoint = None
    if from_checkpoint:
        checkpoint = tmp_path / "start"
        ranks.run(small.save_and_continue, hf_dirs[True], {}, checkpoint, 2, world=1)
    (start, resumed, saved, reference), *_ = ranks.run(
        _resumed, hf_dirs[True], checkpoint, tmp_path / "resumed", world=2
    )
    for row in range(len(start)):
        assert np.array_equal(reference[row], start[row]) and np.array_equal(resumed[row], saved[row])
        assert not np.array_equal(resumed[row], start[row])


def _entropies(directory, layout):
    model, rows = small.learner(directory, layout), small.rows(8)
    both = model.logprobs_and_entropies(rows, small.BUDGET, temperature=0.7, trained_only=True)
    alone = model.logprobs(rows, small.BUDGET, temperature=0.7, trained_only=True)
    found = model.forward(model.pack(rows, small.BUDGET), lambda lp, entropy, _: (entropy, {}), temperature=0.7)[0]
    return both, alone, found


@pytest.mark.parametrize("world, layout", LAYOUTS.values(), ids=LAYOUTS)
def test_entropies_come_with_the_logprobs(ranks, hf_dirs, world, layout):
    for (logprobs, entropies), alone, mean in ranks.run(_entropies, hf_dirs[False], layout, world=world):
        rows = small.rows(8)
        for row, logprob, entropy, want in zip(rows, logprobs, entropies, alone, strict=True):
            np.testing.assert_allclose(logprob, want, rtol=0, atol=1e-6)
            assert entropy.dtype == np.float32 and len(entropy) == len(row)
            assert (entropy[row.weights > 0] > 1).all() and (entropy[row.weights == 0] == 0).all()
        # The loss path's entropies are computed apart from these.
        assert sum(e.sum() for e in entropies) / sum(r.weights.sum() for r in rows) == pytest.approx(mean, rel=1e-5)


def _offloaded(directory):
    """Keep the reference as on a GPU; return what was copied to the host, and whether it holds the start weights."""
    from unittest import mock

    import torch

    from pctrain.core import reference

    model, rows = small.learner(directory, {}), small.rows(6, seed=5)
    start = model.logprobs(rows, small.BUDGET)
    pinned, waited_for = [], []
    copy, empty_like = torch.Tensor.copy_, torch.empty_like

    def empty(tensor, pin_memory=False, **options):
        host = empty_like(tensor, **options)
        pinned.extend([host] if pin_memory else [])
        return host

    def counted(target, source, non_blocking=False):
        waited_for.extend([target] if not non_blocking and any(target is host for host in pinned) else [])
        return copy(target, source)

    with (
        mock.patch.object(reference, "on_gpu", return_value=True),
        mock.patch.object(torch, "empty_like", empty),
        mock.patch.object(torch.Tensor, "copy_", counted),
        mock.patch.object(torch.Tensor, "cpu", side_effect=AssertionError("waits for a GPU")),
    ):
        model.keep_reference(offload=True)
    small.step(model, 0)
    same = all(np.array_equal(a, b) for a, b in zip(_reference_logprobs(model, rows), start, strict=True))
    return len(pinned), len(waited_for), len(_weights(model)), same


def test_offloading_waits_for_no_copy(ranks, hf_dirs):
    ((pinned, waited_for, parameters, same),) = ranks.run(_offloaded, hf_dirs[True], world=1)
    assert pinned == parameters and waited_for == 0 and same
