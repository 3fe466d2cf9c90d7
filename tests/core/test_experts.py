"""Training a mixture of experts: its auxiliary loss against transformers, and the same run at every layout."""

from unittest import mock

import numpy as np
import pytest
import torch

from tests.helpers import families, small

TP2 = {"tensor": 2, "sequence_parallel": True}
LAYOUTS = {
    "EP2": (2, {"expert": 2}),
    "TP2": (2, TP2),
    "DP2": (2, {}),
    "PP2 with virtual stages, recomputed": (2, {"pipeline": 2, "virtual_pipeline": 2, "recompute": "full"}),
    "EP2 x TP2": (4, {"expert": 2, **TP2}),
    "EP2 x PP2": (4, {"expert": 2, "pipeline": 2}),
    "TP2 x PP2": (4, {"pipeline": 2, **TP2}),
    "EP2 of DP4": (4, {"expert": 2}),
    "EP4, reductions overlapped": (4, {"expert": 4, "overlap_grad_reduce": True}),
}
FAST = ("EP2", "EP2 x TP2")
COEFFICIENT = 0.05  # the aux loss then has a large part in the router's gradient


def layouts(fast=FAST):
    return pytest.mark.parametrize(
        "layout", [pytest.param(n, marks=() if n in fast else pytest.mark.full) for n in LAYOUTS]
    )


@pytest.fixture(scope="module")
def directories(tmp_path_factory):
    """{whether the weights of the chosen experts are divided by their sum: model}"""
    folder = tmp_path_factory.mktemp("experts")
    return {
        normalised: families.make(name, folder / name)
        for normalised, name in ((True, "qwen3-moe"), (False, "qwen3-moe-raw"))
    }


# ---- value and gradient of the auxiliary loss


def _reference(directory, rows, budget, coefficient):
    """Return loss, A averaged over tokens and layers, and gradients by name, from transformers in float64."""
    from transformers import AutoModelForCausalLM
    from transformers.models.qwen3_moe.modeling_qwen3_moe import load_balancing_loss_func

    from pctrain.data.packing import PackShape, pack_rows
    from pctrain.hf.config import HFConfig

    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float64, experts_implementation="eager").train()
    shape = PackShape(balanced_length=HFConfig.read(directory).shape.balanced_length)
    c, batch = model.config, pack_rows(rows, budget, shape=shape)
    loss, aux = 0.0, 0.0  # aux: sum over packs and layers of the pack's tokens * A
    for pack in batch.packs:
        gates = []
        for i in pack.rows:
            ids = torch.tensor(rows[i].tokens)[None]
            out = model(ids, output_router_logits=True)
            nll = -torch.log_softmax(out.logits[0, :-1], -1).gather(1, ids[0, 1:, None])[:, 0]
            loss = loss + (nll * torch.tensor(rows[i].weights[1:])).sum() / batch.loss_tokens
            gates.append(out.router_logits)
        for layer in zip(*gates, strict=True):
            gate = torch.cat(layer)
            # transformers counts an expert's tokens k times, and averages all layers before the product: one at a time.
            aux = (
                aux
                + len(gate)
                * load_balancing_loss_func((gate,), c.num_experts, c.num_experts_per_tok)
                / c.num_experts_per_tok
            )
    (loss + coefficient * aux / batch.tokens).backward()
    gradients = {}
    for name, parameter in model.named_parameters():
        gradient = parameter.grad.numpy()
        if ".experts." not in name:
            gradients[name] = gradient
            continue
        stem, matrix = name.rsplit(".", 1)  # of all experts in one; in the files, as in pctrain, each has its own
        for j, of_one in enumerate(gradient):
            parts = ["down_proj"] if matrix == "down_proj" else ["gate_proj", "up_proj"]
            gradients.update(
                zip([f"{stem}.{j}.{part}.weight" for part in parts], np.split(of_one, len(parts)), strict=True)
            )
    return loss.item(), aux.item() / batch.tokens / c.num_hidden_layers, gradients


def _gradient(directory, layout, rows, budget, coefficient):
    """(loss, metrics, gradient norm, {Hugging Face name: gradient}) of the core."""
    from pctrain.core import optimizer, step
    from pctrain.sft.loss import cross_entropy

    model = small.learner(directory, layout, router_aux_loss=coefficient)
    batch = model.pack(rows, budget)
    for chunk in model.chunks:
        chunk.train()
        chunk.zero_grad_buffer()
        chunk.force_all_reduce = True  # where reductions overlap; elsewhere the argument below says it
    finalize = step.finalize_model_grads

    def whole(*args, **kwargs):
        """Left alone, a data parallel rank has its own part of the gradient only."""
        finalize(*args, **{**kwargs, "force_all_reduce": True})

    with mock.patch.object(step, "finalize_model_grads", whole):
        loss, metrics = step.run_loss(
            model.chunks,
            model.head,
            model.spec,
            batch,
            cross_entropy,
            temperature=1.0,
            want_entropy=False,
            backward=True,
        )
    norm = optimizer.global_norm(model.optimizer)
    with torch.no_grad():
        for module in model.modules:
            for parameter in module.parameters():
                parameter.copy_(parameter.main_grad)
    return loss, metrics, norm, {name: tensor.numpy().copy() for name, tensor in model.hf_weights()}


@pytest.fixture(scope="module")
def references(directories):
    """{normalised: `_reference` of packs of several sequences}"""
    return {
        normalised: _reference(folder, small.rows(), small.BUDGET, COEFFICIENT)
        for normalised, folder in directories.items()
    }


@pytest.fixture(scope="module")
def reference_of_a_pack_each(directories):
    return _reference(directories[True], small.rows_of_a_pack(), small.BUDGET, COEFFICIENT)


def _assert_equal_gradients(found, reference):
    loss, metrics, norm, gradients = found
    expected_loss, expected_aux, expected = reference
    # float32 against float64.
    assert loss == pytest.approx(expected_loss, rel=1e-6)
    assert metrics == {"router_aux_loss": pytest.approx(expected_aux, rel=1e-6)}
    assert norm == pytest.approx(np.sqrt(sum((g**2).sum() for g in expected.values())), rel=1e-5)
    assert gradients.keys() == expected.keys()
    for name, gradient in expected.items():
        np.testing.assert_allclose(gradients[name], gradient, atol=2e-5 * np.abs(gradient).max(), rtol=0, err_msg=name)


@pytest.mark.parametrize("normalised", [True, False], ids=["normalised", "raw"])
def test_the_auxiliary_loss_and_its_gradient_are_those_of_transformers(ranks, directories, references, normalised):
    found = ranks.run(_gradient, directories[normalised], {}, small.rows(), small.BUDGET, COEFFICIENT, world=1)[0]
    _assert_equal_gradients(found, references[normalised])
    without = ranks.run(_gradient, directories[normalised], {}, small.rows(), small.BUDGET, 0.0, world=1)[0]
    assert without[0] == found[0] and without[1] == {}
    router = "model.layers.1.mlp.gate.weight"  # it can be told whether the loss is in the gradient, and how often
    assert np.abs(without[3][router] - found[3][router]).max() > 0.05 * np.abs(found[3][router]).max()


@layouts()
def test_the_auxiliary_loss_is_the_same_at_every_layout(ranks, directories, reference_of_a_pack_each, layout):
    world, parallel = LAYOUTS[layout]
    for found in ranks.run(
        _gradient, directories[True], parallel, small.rows_of_a_pack(), small.BUDGET, COEFFICIENT, world=world
    ):
        _assert_equal_gradients(found, reference_of_a_pack_each)


@pytest.mark.parametrize(
    "world, layout",
    [
        (1, {}),
        pytest.param(4, {"expert": 4}, marks=pytest.mark.full),
        pytest.param(4, {"expert": 2, **TP2}, marks=pytest.mark.full),
    ],
    ids=["single", "EP4", "EP2 x TP2"],
)
def test_padding_has_no_part_in_the_auxiliary_loss(ranks, directories, world, layout):
    """One short sequence: most of its pack is padding, other ranks have only padding, and some experts no token."""
    rows = small.rows(1, longest=4)
    reference = _reference(directories[True], rows, small.BUDGET, COEFFICIENT)
    for found in ranks.run(_gradient, directories[True], layout, rows, small.BUDGET, COEFFICIENT, world=world):
        _assert_equal_gradients(found, reference)


def _forward(directory, coefficient):
    """Loss and metrics of a forward pass, what was found of main_grad, filled with sevens, after it, and log-probs."""
    from pctrain.data.packing import pack_rows
    from pctrain.sft.loss import cross_entropy

    model = small.learner(directory, {}, router_aux_loss=coefficient)
    for parameter in model.modules[0].parameters():
        parameter.main_grad.fill_(7.0)
    loss, metrics = model.forward(pack_rows(small.rows(), small.BUDGET), cross_entropy, want_entropy=False)
    untouched = all((parameter.main_grad == 7.0).all() for parameter in model.modules[0].parameters())
    return loss, metrics, untouched, model.logprobs(small.rows(), small.BUDGET)


def test_forward_alone_knows_nothing_of_the_auxiliary_loss(ranks, directories):
    results = [ranks.run(_forward, directories[True], coefficient, world=1)[0] for coefficient in (0.0, COEFFICIENT)]
    for loss, metrics, untouched, logprobs in results:
        assert loss == results[0][0] and metrics == {} and untouched
        assert all(np.array_equal(a, b) for a, b in zip(logprobs, results[0][3], strict=True))


# ---- training


@pytest.fixture(scope="module")
def alone(ranks, directories):
    """{coefficient: the run of one process}"""
    return {
        c: ranks.run(small.train, directories[True], {}, 3, router_aux_loss=c, world=1)[0] for c in (0.0, COEFFICIENT)
    }


@pytest.mark.parametrize(
    "coefficient", [pytest.param(0.0, marks=pytest.mark.full), COEFFICIENT], ids=["no aux loss", "aux loss"]
)
@layouts()
def test_training_at_any_layout_is_the_same_run(ranks, directories, alone, layout, coefficient):
    """Every expert's gradient counts once in the norm, and the norm clips (at 1) in the first step."""
    world, parallel = LAYOUTS[layout]
    expected = alone[coefficient]
    assert expected["grad_norm"][0] > small.OPTIMIZER.clip
    results = ranks.run(small.train, directories[True], parallel, 3, router_aux_loss=coefficient, world=world)
    for result in results:
        np.testing.assert_allclose(
            result["loss"], expected["loss"], rtol=1e-5
        )  # fp32, another order of sums, 3 steps of Adam
        np.testing.assert_allclose(result["grad_norm"], expected["grad_norm"], rtol=1e-4)
        for metrics, theirs in zip(result["metrics"], expected["metrics"], strict=True):
            assert (
                metrics == pytest.approx(theirs, rel=1e-5)
                and metrics == results[0]["metrics"][result["metrics"].index(metrics)]
            )
        assert result["loss"] == results[0]["loss"] and result["grad_norm"] == results[0]["grad_norm"]
    for name, weight in expected["weights"].items():
        # Adam divides by the root of tiny second moments: where a gradient is near 0, its sign is rounding.
        assert np.isclose(results[0]["weights"][name], weight, rtol=1e-3, atol=2e-4).mean() > 0.99, name


# ---- checkpoints

STEPS = 3


@layouts(fast=("EP2",))
def test_a_resumed_run_is_the_same_bit_for_bit(ranks, directories, tmp_path, layout):
    world, parallel = LAYOUTS[layout]
    uninterrupted = ranks.run(
        small.save_and_continue,
        directories[True],
        parallel,
        tmp_path / "step-3",
        STEPS,
        world=world,
        router_aux_loss=COEFFICIENT,
    )
    resumed = ranks.run(
        small.load_and_continue,
        directories[True],
        parallel,
        tmp_path / "step-3",
        STEPS,
        world=world,
        router_aux_loss=COEFFICIENT,
    )
    for a, b in zip(uninterrupted, resumed, strict=True):
        assert a[:3] == b[:3]
        assert all(np.array_equal(a[3][name], b[3][name]) for name in a[3])


OTHERS = {"single": (1, {}), **LAYOUTS}


SLOW_PAIRS = (
    ("single", "EP2"),
    ("EP2", "DP2"),
    ("DP2", "EP2"),
    ("EP2", "TP2"),
    ("EP2", "EP2 x TP2"),
    ("EP2 x TP2", "EP2 x PP2"),
    ("TP2 x PP2", "EP4, reductions overlapped"),
    ("EP2 of DP4", "single"),
)


@pytest.mark.parametrize(
    ("saved", "loaded"),
    [("EP2", "single"), *(pytest.param(*pair, marks=pytest.mark.full) for pair in SLOW_PAIRS)],
)
def test_a_run_resumes_at_another_layout(ranks, directories, tmp_path, saved, loaded):
    uninterrupted, resumed = (
        ranks.run(
            call,
            directories[True],
            OTHERS[layout][1],
            tmp_path / "step-3",
            STEPS,
            world=OTHERS[layout][0],
            router_aux_loss=COEFFICIENT,
        )[0]
        for call, layout in ((small.save_and_continue, saved), (small.load_and_continue, loaded))
    )
    np.testing.assert_allclose(resumed[0], uninterrupted[0], rtol=1e-5)  # fp32 sums in another order
    np.testing.assert_allclose(resumed[1], uninterrupted[1], rtol=1e-4)
    assert [list(metrics) for _, metrics in resumed[2]] == [["router_aux_loss"]] * STEPS
