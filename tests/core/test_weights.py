"""Hugging Face weights in and out: bit for bit at every layout, and never half loaded in silence."""

import json
import shutil

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from tests.helpers import small


def _export(directory, layout):
    return {name: tensor.numpy().copy() for name, tensor in small.learner(directory, layout, train=False).hf_weights()}


def _qwen2(folder, source):
    """A Qwen2-shaped directory (bias on q, k and v) made from a Llama-shaped one."""
    shutil.copytree(source, folder)
    config = json.loads((folder / "config.json").read_text())
    config |= {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2"}
    (folder / "config.json").write_text(json.dumps(config))
    weights = load_file(folder / "model.safetensors")
    rng = np.random.default_rng(0)
    for name in [n for n in weights if n.endswith(("q_proj.weight", "k_proj.weight", "v_proj.weight"))]:
        weights[name.replace(".weight", ".bias")] = rng.standard_normal(weights[name].shape[0]).astype(np.float32)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize(
    "world, layout",
    [(1, {}), (2, {"tensor": 2}), (2, {"pipeline": 2}), (2, {"pipeline": 2, "virtual_pipeline": 2}),
     (2, {"pipeline": 2, "first_stage_layers": 1}), (4, {"tensor": 2, "pipeline": 2})],
    ids=["single", "TP2", "PP2", "PP2 with virtual stages", "PP2 of 1 and 3 layers", "TP2 x PP2"])  # fmt: skip
@pytest.mark.parametrize("kind", ["tied", "untied", "qwen2"])
def test_every_tensor_comes_out_as_it_went_in(ranks, hf_dirs, tmp_path, world, layout, kind):
    directory = _qwen2(tmp_path / "qwen2", hf_dirs[False]) if kind == "qwen2" else hf_dirs[kind == "tied"]
    expected = load_file(directory / "model.safetensors")
    if kind == "tied":
        expected["lm_head.weight"] = expected["model.embed_tokens.weight"]
    for exported in ranks.run(_export, directory, layout, world=world):
        assert exported.keys() == expected.keys()
        for name, tensor in expected.items():
            assert exported[name].dtype == tensor.dtype and np.array_equal(exported[name], tensor), name


def _export_folder(directory, layout, folder):
    small.learner(directory, layout, train=False).export(folder)


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_an_exported_directory_is_the_one_that_was_loaded(ranks, hf_dirs, tmp_path, tied):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    ranks.run(_export_folder, hf_dirs[tied], {"tensor": 2}, tmp_path / "hf", world=2)
    assert not list(tmp_path.glob("*.tmp"))
    before, after = (load_file(folder / "model.safetensors") for folder in (hf_dirs[tied], tmp_path / "hf"))
    assert before.keys() == after.keys() and all(np.array_equal(before[name], after[name]) for name in before)
    assert (
        AutoModelForCausalLM.from_pretrained(tmp_path / "hf").config.vocab_size
        == before["model.embed_tokens.weight"].shape[0]
    )
    assert AutoTokenizer.from_pretrained(tmp_path / "hf")("12+3")["input_ids"]


def test_qwen2_equals_transformers(ranks, hf_dirs, tmp_path):
    import torch
    from transformers import AutoModelForCausalLM

    directory = _qwen2(tmp_path / "qwen2", hf_dirs[False])
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    row = small.rows(1)[0]
    ours = ranks.run(_logprob_of, directory, row, world=1)[0]
    ids = torch.tensor(row.tokens)[None]
    with torch.no_grad():
        theirs = torch.log_softmax(model(ids).logits[0], -1)[:-1].gather(1, ids[0, 1:, None])[:, 0]
    np.testing.assert_allclose(ours[1:], theirs.numpy(), atol=1e-5)  # fp32, another order of sums


def _logprob_of(directory, row):
    return small.learner(directory, {}, train=False).logprobs([row], small.BUDGET)[0]


def _break(folder, source, change):
    shutil.copytree(source, folder)
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def _error_of(directory):
    from pctrain.common.errors import UserError

    try:
        small.learner(directory, {}, train=False)
    except UserError as error:
        return str(error)
    return "no error"


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda w: w.pop("model.norm.weight"), ["missing: model.norm.weight"]),
        (lambda w: w.update({"model.extra": np.zeros(2, np.float32)}), ["unknown: model.extra"]),
        (lambda w: w.update({"model.norm.weight": np.ones(31, np.float32)}), ["model.norm.weight", "[31]", "[32]"]),
    ],
    ids=["missing", "unknown", "wrong shape"],
)
def test_a_directory_that_does_not_fit_is_refused_by_name(ranks, hf_dirs, tmp_path, change, words):
    message = ranks.run(_error_of, _break(tmp_path / "broken", hf_dirs[True], change), world=1)[0]
    assert all(word in message for word in words), message


def test_unreadable_directories_are_refused(ranks, hf_dirs, tmp_path):
    truncated = tmp_path / "truncated"
    shutil.copytree(hf_dirs[True], truncated)
    (truncated / "model.safetensors").write_bytes((truncated / "model.safetensors").read_bytes()[:100])
    assert "not a readable safetensors file" in ranks.run(_error_of, truncated, world=1)[0]

    other = tmp_path / "other"
    shutil.copytree(hf_dirs[True], other)
    config = json.loads((other / "config.json").read_text()) | {"architectures": ["MambaForCausalLM"]}
    (other / "config.json").write_text(json.dumps(config))
    message = ranks.run(_error_of, other, world=1)[0]
    assert "MambaForCausalLM" in message and "LlamaForCausalLM" in message
    assert "config.json: not found" in ranks.run(_error_of, tmp_path / "nowhere", world=1)[0]
