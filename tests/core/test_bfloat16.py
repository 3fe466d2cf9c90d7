"""bfloat16 parameters and activations, with gradients, masters and moments in float32."""

import numpy as np

from tests.helpers import small

STEPS = 20


def _train(directory, dtype):
    import torch

    model = small.learner(directory, {"tensor": 2}, dtype=dtype)
    losses = [small.step(model, i).loss for i in range(STEPS)]
    parameters = [p for chunk in model.chunks for p in chunk.module.parameters()]
    inner = model.optimizer.chained_optimizers[0].optimizer
    masters = [p for group in inner.param_groups for p in group["params"]]
    moments = [state[name] for state in inner.state.values() for name in ("exp_avg", "exp_avg_sq")]
    kinds = {
        "parameters": parameters,
        "gradients": [p.main_grad for p in parameters],
        "masters": masters,
        "moments": moments,
    }
    assert all(kinds.values())
    assert all(torch.isfinite(p).all() for p in parameters)
    return losses, {kind: sorted({str(t.dtype) for t in tensors}) for kind, tensors in kinds.items()}


def test_training_follows_float32(ranks, hf_dirs):
    fp32, _ = ranks.run(_train, hf_dirs[False], "float32", world=2)[0]
    bf16, dtypes = ranks.run(_train, hf_dirs[False], "bfloat16", world=2)[0]
    assert dtypes == {
        "parameters": ["torch.bfloat16"],
        "gradients": ["torch.float32"],
        "masters": ["torch.float32"],
        "moments": ["torch.float32"],
    }
    # bfloat16 keeps 8 bits: a logit of size 1 is off by up to 2^-9, and a mean of hundreds of token losses by less.
    np.testing.assert_allclose(bf16, fp32, rtol=2**-9)
    assert bf16 != fp32 and fp32[-1] < fp32[0] - 0.05


def _run(directory, folder, resumed):
    model = small.learner(directory, {}, dtype="bfloat16")
    if resumed:
        model.load(folder)
    else:
        for i in range(5):
            small.step(model, i)
        folder.mkdir()
        model.save(folder)
    updates = [small.step(model, i) for i in range(5, 10)]
    weights = {name: tensor.float().numpy().copy() for name, tensor in model.hf_weights()}
    return [(u.loss, u.grad_norm, u.lr) for u in updates], weights


def test_a_resumed_run_is_exact(ranks, hf_dirs, tmp_path):
    [(expected, weights)] = ranks.run(_run, hf_dirs[True], tmp_path / "step-5", False, world=1)
    [(resumed, resumed_weights)] = ranks.run(_run, hf_dirs[True], tmp_path / "step-5", True, world=1)
    assert resumed == expected
    assert all(np.array_equal(resumed_weights[name], weight) for name, weight in weights.items())


def _rounded_gradients(directory):
    """Names of the matrices whose main_grad holds nothing but bfloat16 values after one micro-batch."""
    from pctrain.core import step
    from pctrain.sft.loss import cross_entropy

    model = small.learner(directory, {}, dtype="bfloat16")
    rng = np.random.default_rng(0)
    batch = model.pack(
        [small.make_row(rng.integers(3, 260, 5).tolist(), rng.integers(3, 260, 32).tolist()) for _ in range(4)], 256
    )
    assert batch.loss_tokens == 128 and len(batch.packs) == 1  # a power of two: dividing by it rounds nothing
    [chunk] = model.chunks
    chunk.zero_grad_buffer()
    step.run_loss(
        model.chunks, model.head, model.spec, batch, cross_entropy, temperature=1.0, want_entropy=False, backward=True
    )
    matrices = {
        name: p.main_grad for name, p in chunk.module.named_parameters() if p.ndim == 2 and "embedding" not in name
    }
    assert all(gradient.any() for gradient in matrices.values())
    return len(matrices), [
        name for name, gradient in matrices.items() if bool((gradient.bfloat16().float() == gradient).all())
    ]


def test_gradients_of_matrices_are_never_rounded_to_bfloat16(ranks, hf_dirs):
    [(matrices, rounded)] = ranks.run(_rounded_gradients, hf_dirs[False], world=1)
    assert matrices == 4 * 4 + 1  # four a layer, and the head
    assert not rounded
