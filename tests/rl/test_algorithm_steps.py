"""A whole training step with packed rows, on one rank and two, against the naive loss of the learner's log-probs."""

import numpy as np
import pytest
import torch

from pctrain.rl import batch
from tests.helpers import naive_losses, rl_cases, small

NAIVE = {
    "grpo": naive_losses.grpo,
    "dapo_d": naive_losses.grpo,
    "dapo_dc": lambda g, t: naive_losses.grpo(g, t, high=0.28, std=True, entropy_coef=0),
    "luffy": naive_losses.luffy,
    "srft": naive_losses.srft,
    "upt": lambda g, t: naive_losses.upt(g, t, gamma=1, coefficient=0.3),
    "prefix_rft": naive_losses.prefix_rft,
}
BUDGET = 48


def _step(directory, layout, name, normaliser):
    """Return the second of two updates, the naive loss of the same, and the phases and sizes of the passes."""
    model = small.learner(directory, layout)
    model.keep_reference()
    own = {"gamma": 1, "sft_coef": 0.3} if name == "upt" else {}
    algorithm = rl_cases.algorithm(name, updates=2, normaliser=normaliser, **own)
    groups = rl_cases.random_groups(1, prompts=5, prefix=name == "prefix_rft")
    rows = algorithm.rows(groups)
    needed = algorithm.streams_from_pass | {
        "ref_logprob"
    }  # not read by the loss without a coefficient, but it is a metric
    needed -= {"ref_logprob"} if name == "srft" else set()
    rows, passes = batch.add_streams_from_pass(rows, model, needed, BUDGET, 0.9)
    counted = [(of.phase, len(of.rows), sum(map(len, of.rows))) for of in passes]
    first_kl = max(
        abs(row.streams.get("ref_logprob", row.streams["old_logprob"]) - row.streams["old_logprob"]).max()
        for row in rows
    )
    finished = algorithm.finish(rows)
    model.train_step(batch.pack(finished, model, algorithm, BUDGET), algorithm.loss, temperature=0.9)
    logprobs, entropies = model.logprobs_and_entropies(finished, BUDGET, temperature=0.9, trained_only=True)

    def of(values):
        return torch.from_numpy(values[3:]).double()

    # SRFT's and Prefix-RFT's entropies are those before the update, the bonus takes the present ones: it is left to the
    # other tests.
    tokens = [
        rl_cases.Tokens(of(lp), of(row.streams.get("entropy", h)), of(row.streams["old_logprob"]), of(lp))
        for row, lp, h in zip(finished, logprobs, entropies, strict=True)
    ]
    update = model.train_step(batch.pack(finished, model, algorithm, BUDGET), algorithm.loss, temperature=0.9)
    naive = NAIVE[name](groups, tokens).item()
    return update, naive, algorithm.options.entropy_coef, tokens, entropies, counted, first_kl


def expected(update_tokens, naive, entropy_coef, entropies):
    """Return the naive loss with the bonus of the present entropies."""
    count = sum(len(t.logprob) for t in update_tokens)
    before = sum(t.entropy.sum().item() for t in update_tokens) / count
    now = sum(h.sum(dtype=np.float64) for h in entropies) / count
    return naive + entropy_coef * (before - now), count


@pytest.mark.parametrize(
    "world, layout",
    [
        pytest.param(2, {}, id="DP2"),
        pytest.param(1, {}, id="single", marks=pytest.mark.full),
        pytest.param(2, {"tensor": 2}, id="TP2", marks=pytest.mark.full),
        pytest.param(2, {"pipeline": 2}, id="PP2", marks=pytest.mark.full),
    ],
)
def test_a_step_is_the_naive_loss_of_the_whole_batch(ranks, hf_dirs, world, layout):
    for name in NAIVE:
        if name == "upt":  # its bonus excludes the expert's tokens; tested below
            continue
        results = ranks.run(_step, hf_dirs[True], layout, name, "token", world=world)
        for update, naive, coefficient, tokens, entropies, counted, first_kl in results:
            want, _ = expected(tokens, naive, coefficient, entropies)
            assert update.loss == pytest.approx(want, rel=1e-4, abs=1e-6), name
            assert not update.skipped and update.grad_norm > 1e-3
            assert first_kl == 0
            sizes = (len(tokens), sum(len(t.logprob) + 3 for t in tokens))
            assert counted == [("logprob", *sizes), *([("reference", *sizes)] if name != "srft" else [])]


def _upt(directory, layout):
    return _step(directory, layout, "upt", "token"), _step(directory, layout, "upt", "published")


def test_upt_in_a_step(ranks, hf_dirs):
    single, *_ = ranks.run(_upt, hf_dirs[True], {}, world=1)
    for of_rank in ranks.run(_upt, hf_dirs[True], {}, world=2):
        for ours, alone in zip(of_rank, single, strict=True):
            assert ours[0].loss == pytest.approx(alone[0].loss, rel=1e-5)
            assert ours[0].grad_norm == pytest.approx(alone[0].grad_norm, rel=1e-4)
            assert ours[0].metrics == pytest.approx(alone[0].metrics, rel=1e-5)
    (update, naive, *_), (published, *_) = single
    assert update.loss == pytest.approx(naive, rel=5e-3)  # apart from the bonus, 0.001 x a change of entropy
    assert published.loss != pytest.approx(update.loss, rel=0.1)
    assert published.metrics["expert"] == pytest.approx(update.metrics["expert"])  # metrics stay means over tokens


def _kl(directory):
    """Return the first KL, the KL after three steps towards random advantages, and the ledger's phases."""
    model = small.learner(directory, {})
    model.keep_reference()
    algorithm, groups = rl_cases.algorithm("grpo", kl_coef=0.1), rl_cases.random_groups(1)
    updates = []
    for _ in range(3):
        rows, _ = batch.add_streams_from_pass(algorithm.rows(groups), model, algorithm.streams_from_pass, BUDGET, 1.0)
        packed = batch.pack(algorithm.finish(rows), model, algorithm, BUDGET)
        updates.append(model.train_step(packed, algorithm.loss))
    return [update.metrics["kl"] for update in updates]


def test_the_first_kl_is_zero(ranks, hf_dirs):
    first, second, third = ranks.run(_kl, hf_dirs[True], world=1)[0]
    assert abs(first) < 1e-9 < second < third
