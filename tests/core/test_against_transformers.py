"""The core against an independent implementation: transformers' model, torch's cross-entropy, AdamW and clipping."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from tests.helpers import small


def _logprobs(directory, layout, rows):
    return small.learner(directory, layout, train=False).logprobs(rows, small.BUDGET)


def _transformers_logprobs(model, row):
    ids = torch.tensor(row.tokens)[None]
    with torch.no_grad():
        logprobs = torch.log_softmax(model(ids).logits[0].double(), -1)
    return logprobs[:-1].gather(1, ids[0, 1:, None])[:, 0].numpy()


@pytest.fixture(scope="module")
def transformers_models(hf_dirs):
    from transformers import AutoModelForCausalLM

    return {tied: AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32) for tied, path in hf_dirs.items()}


@pytest.mark.parametrize(
    "layout",
    [
        (1, {}),
        (2, {"tensor": 2, "sequence_parallel": True}),
        (2, {"pipeline": 2}),
        (2, {"pipeline": 2, "virtual_pipeline": 2}),
        (2, {}),
    ],
    ids=["single", "TP2 SP", "PP2", "PP2 with virtual stages", "DP2"])  # fmt: skip
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_logprobs_of_packed_sequences_equal_each_sequence_alone(ranks, hf_dirs, transformers_models, layout, tied):
    world, parallel = layout
    rows = small.rows(longest=240)
    for result in ranks.run(_logprobs, hf_dirs[tied], parallel, rows, world=world):
        for row, ours in zip(rows, result, strict=True):
            assert ours[0] == 0
            # fp32 against fp32 with another order of sums; measured 1e-6.
            np.testing.assert_allclose(ours[1:], _transformers_logprobs(transformers_models[tied], row), atol=1e-5)


def _train(directory, steps):
    return small.train(directory, {}, steps)


def test_training_equals_transformers_and_torch_adamw(ranks, hf_dirs, transformers_models):
    import copy

    steps, config = 6, small.OPTIMIZER
    ours = ranks.run(_train, hf_dirs[True], steps, world=1)[0]
    model = copy.deepcopy(transformers_models[True]).train()
    decayed = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim <= 1]
    groups = [{"params": decayed, "weight_decay": config.weight_decay}, {"params": others, "weight_decay": 0.0}]
    adamw = torch.optim.AdamW(groups, lr=config.lr, betas=(config.beta1, config.beta2), eps=config.eps)
    for step in range(steps):
        for group in adamw.param_groups:
            group["lr"] = config.lr * min(1.0, (step + 1) / config.warmup)
        rows = small.rows(seed=step)
        total = sum(float(row.weights.sum()) for row in rows)
        loss = 0.0
        for row in rows:  # a plain loop, no packing: sum of the response's losses / all response tokens of the batch
            ids = torch.tensor(row.tokens)[None]
            losses = F.cross_entropy(model(ids).logits[0, :-1], ids[0, 1:], reduction="none")
            loss = loss + (losses * torch.tensor(row.weights[1:])).sum() / total
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), config.clip)
        adamw.step()
        adamw.zero_grad()
        assert ours["loss"][step] == pytest.approx(loss.item(), rel=1e-5)  # fp32, 6 steps of Adam apart
        assert ours["grad_norm"][step] == pytest.approx(norm.item(), rel=1e-4)


def _gradient_of_one_row(directory, rows, which):
    """main_grad of the embedding rows of every token, where only row `which` is trained on."""
    from dataclasses import replace

    from pctrain.core import step as core_step
    from pctrain.data.packing import pack_rows
    from pctrain.distributed import parallel  # noqa: F401
    from pctrain.sft.loss import cross_entropy

    model = small.learner(directory, {})
    masked = [row if i == which else replace(row, weights=np.zeros_like(row.weights)) for i, row in enumerate(rows)]
    model.chunks[0].zero_grad_buffer()
    core_step.run_loss(
        model.chunks,
        model.head,
        model.spec,
        pack_rows(masked, 1024),
        cross_entropy,
        temperature=1.0,
        want_entropy=False,
        backward=True,
    )
    return model.chunks[0].module.embedding.word_embeddings.weight.main_grad.abs().sum(1).numpy().copy()


def test_no_gradient_crosses_a_sequence_bound(ranks, hf_dirs):
    rng = np.random.default_rng(3)
    # Disjoint alphabets: a token of another sequence can only get a gradient by attention across the bound.
    rows = [
        small.make_row(rng.integers(lo, lo + 40, 4).tolist(), rng.integers(lo, lo + 40, 30).tolist())
        for lo in (10, 60, 110, 160)
    ]
    gradient = ranks.run(_gradient_of_one_row, hf_dirs[False], rows, 2, world=1)[0]
    assert gradient[110:150].sum() > 0
    assert gradient[:110].sum() == 0 and gradient[150:].sum() == 0
