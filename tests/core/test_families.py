"""Every family against transformers, at every layout: the same log-probs, and the same tensors out as in."""

import json

import numpy as np
import pytest
import torch

from tests.helpers import families, small
from tests.helpers.tensor_files import assert_equal_tensors, tensors

LAYOUTS = {
    "single": (1, {}),
    "TP2": (2, {"tensor": 2}),
    "PP2": (2, {"pipeline": 2}),
    "TP2 x PP2": (4, {"tensor": 2, "pipeline": 2}),
}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """{family: (directory with a sharded index, sequences, their log-probs by transformers)}"""
    from transformers import AutoModelForCausalLM

    found = {}
    for name in families.FAMILIES:
        folder = families.make(name, tmp_path_factory.mktemp("families") / name, max_shard_size="40KB")
        assert (folder / "model.safetensors.index.json").exists()
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        rows, logprobs = small.rows(6, longest=240), []
        for row in rows:
            ids = torch.tensor(row.tokens)[None]
            with torch.no_grad():
                table = torch.log_softmax(model(ids).logits[0].double(), -1)
            logprobs.append(table[:-1].gather(1, ids[0, 1:, None])[:, 0].numpy())
        found[name] = folder, rows, logprobs
    return found


def _logprobs_and_export(directory, layout, rows, out):
    model = small.learner(directory, layout, train=False)
    found = model.logprobs(rows, small.BUDGET)
    model.export(out)
    return found


@pytest.mark.parametrize(
    "layout", [name if name == "TP2" else pytest.param(name, marks=pytest.mark.full) for name in LAYOUTS]
)
@pytest.mark.parametrize("family", families.FAMILIES)
def test_logprobs_equal_transformers_and_tensors_come_out_as_they_went_in(ranks, models, tmp_path, family, layout):
    directory, rows, expected = models[family]
    world, parallel = LAYOUTS[layout]
    for result in ranks.run(_logprobs_and_export, directory, parallel, rows, tmp_path / "out", world=world):
        worst = max(float(np.abs(ours[1:] - theirs).max()) for ours, theirs in zip(result, expected, strict=True))
        assert worst < 2e-5  # fp32, another order of sums; measured below 5e-6
    assert_equal_tensors(tensors(tmp_path / "out"), tensors(directory))


def _export_shards(directory, layout, out, shard_bytes):
    from pctrain.core import weights
    from pctrain.distributed import parallel

    model = small.learner(directory, layout, train=False)
    writes = parallel.rank() == 0
    weights.save_hf(model.modules, model.hf, False, directory, out, writes=writes, shard_bytes=shard_bytes)


def test_a_large_export_is_sharded_and_transformers_reads_it(ranks, models, tmp_path):
    from transformers import AutoModelForCausalLM

    directory = models["qwen2"][0]
    ranks.run(_export_shards, directory, {"tensor": 2}, tmp_path / "out", 50_000, world=2)
    files = sorted(tmp_path.glob("out/*.safetensors"))
    assert len(files) > 2 and all(
        file.stat().st_size < 55_000 for file in files
    )  # 50 000 bytes of tensors and a header
    assert_equal_tensors(tensors(tmp_path / "out"), tensors(directory))
    index = json.loads((tmp_path / "out/model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == tensors(directory).keys()
    both = [AutoModelForCausalLM.from_pretrained(folder).state_dict() for folder in (directory, tmp_path / "out")]
    assert all(torch.equal(both[0][name], both[1][name]) for name in both[0])


@pytest.mark.parametrize(
    "layout",
    [
        {"expert": 2},
        pytest.param({"expert": 2, "pipeline": 2}, marks=pytest.mark.full),
        pytest.param({"expert": 2, "tensor": 2}, marks=pytest.mark.full),
    ],
    ids=["EP2", "EP2 x PP2", "EP2 x TP2"],
)
def test_experts_spread_over_ranks_come_out_as_they_went_in(ranks, models, tmp_path, layout):
    directory = models["qwen3-moe"][0]
    world = 2 * layout.get("pipeline", 1) * layout.get("tensor", 1)
    held = ranks.run(_export_experts, directory, layout, tmp_path / "out", world=world)
    assert all(
        count == 2 * 2 * 4 // layout.get("pipeline", 1) for count in held
    )  # 2 of 4 experts, 2 matrices, 4 layers
    assert_equal_tensors(tensors(tmp_path / "out"), tensors(directory))


def _export_experts(directory, layout, out):
    model = small.learner(directory, layout, train=False)
    model.export(out)
    return sum(".experts." in name for module in model.modules for name, _ in module.named_parameters())


def _train(directory, layout):
    return small.train(directory, layout, 3)


@pytest.mark.parametrize("family", ["qwen3", pytest.param("llama3", marks=pytest.mark.full)])
def test_training_at_any_layout_is_the_same_run(ranks, models, family):
    """Query and key norms are whole on every tensor parallel rank, their gradients are not."""
    alone = ranks.run(_train, models[family][0], {}, world=1)[0]
    for layout in ({"tensor": 2}, {"pipeline": 2}):
        both = ranks.run(_train, models[family][0], layout, world=2)
        for result in both:
            np.testing.assert_allclose(
                result["loss"], alone["loss"], rtol=1e-5
            )  # fp32, another order of sums, 3 steps of Adam
            np.testing.assert_allclose(result["grad_norm"], alone["grad_norm"], rtol=1e-4)


@pytest.mark.parametrize("family", families.FAMILIES)
def test_names_under_transformer_engine_are_megatron_cores_own(models, family):
    """megatron-core's local spec names its norms as Transformer Engine does, which fuses them into the next linear."""
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec

    from pctrain.core.weights import units
    from pctrain.hf.config import HFConfig

    hf = HFConfig.read(models[family][0])
    renamed = dict(get_gpt_layer_local_spec().submodules.sharded_state_dict_keys_map)
    assert len(renamed) == 2
    if hf.experts:
        del renamed[
            "pre_mlp_layernorm."
        ]  # its Transformer Engine spec keeps that norm apart: a router stands behind it
    expected = []
    for unit in units(hf, te=False):
        name = unit.name
        for ours, theirs in renamed.items():
            name = name.replace(f".{ours}", f".{theirs}")
        expected.append(name)
    assert [unit.name for unit in units(hf, te=True)] == expected
    assert sum("q_layernorm" in name for name in expected) == (hf.layers if hf.qk_norm else 0)
