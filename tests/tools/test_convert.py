"""`pctrain convert` as a user meets it: there and back at other layouts, verified, and what it refuses."""

import json
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from pctrain.common.errors import UserError
from pctrain.hf import weight_files
from pctrain.hf.config import FAMILIES, HFConfig
from tests.helpers import families
from tests.helpers.tiny import command


@pytest.fixture(scope="module")
def qwen3(tmp_path_factory):
    """Save a model in bfloat16, as published models are."""
    folder = families.make("qwen3", tmp_path_factory.mktemp("convert") / "qwen3")
    weights = {name: tensor.bfloat16() for name, tensor in load_file(folder / "model.safetensors").items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"dtype": "bfloat16"}))
    return folder


def test_there_and_back_at_other_layouts_is_bit_for_bit(ranks, qwen3, tmp_path):
    checkpoint, out = tmp_path / "start" / "step-0", tmp_path / "out"
    for result in ranks.run(
        command, "convert", "hf-to-mcore", qwen3, checkpoint, "--verify", "--parallel.tensor=2", world=2
    ):
        assert result[0] == 0, result[1]
    source = f"--model.path={qwen3}"
    back = ranks.run(
        command, "convert", "mcore-to-hf", checkpoint, out, source, "--verify", "--parallel.pipeline=2", world=2
    )
    assert [status for status, _ in back] == [0, 0], back
    assert "with those of transformers: largest difference" in back[0][1] and "bfloat16" in back[0][1]
    before, after = load_file(qwen3 / "model.safetensors"), load_file(out / "model.safetensors")
    assert before.keys() == after.keys()
    assert all(
        after[name].dtype == torch.bfloat16 and torch.equal(after[name], tensor) for name, tensor in before.items()
    )
    assert json.loads((out / "config.json").read_text()) == json.loads((qwen3 / "config.json").read_text())
    # An RL run takes its switch point from state.json, and a checkpoint without its manifest is not a checkpoint.
    assert {"manifest.json", "state.json"} <= {file.name for file in checkpoint.iterdir()}
    status, text = ranks.run(command, "convert", "mcore-to-hf", checkpoint, out, source, world=1)[0]
    assert status == 2 and f"{out} exists already" in text


def _verify_against(directory, other):
    from pctrain.config.tree import Config
    from pctrain.tools import convert

    learner = convert._learner(Config(), directory)
    try:
        convert._verify(learner, other)
    except UserError as error:
        return str(error)
    return "no error"


def test_verify_refuses_weights_that_differ(ranks, qwen3, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(qwen3, other)
    weights = load_file(other / "model.safetensors")
    name = "model.layers.3.self_attn.k_norm.weight"
    weights[name] = weights[name] * 1.1
    save_file(weights, other / "model.safetensors", metadata={"format": "pt"})
    assert "differ from those of transformers" in ranks.run(_verify_against, qwen3, other, world=1)[0]


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["hf-to-mcore", "HF"], "expected 2 folders, got /"),
        (["hf-to-mcore", "HF", "out"], "expected a checkpoint folder named step-N"),
        (["mcore-to-hf", "HF", "out"], "needs --model.path"),
        (["mcore-to-hf", "HF", "out", "--model.path=HF"], "manifest.json is missing"),
        (["hf-to-mcore", "HF", "step-0", "--verify", "--model.dtype=bfloat16"], "--verify compares in float32"),
    ],
    ids=["one folder", "name", "no model.path", "no checkpoint", "bfloat16"],
)
def test_convert_refuses(ranks, qwen3, tmp_path, arguments, words):
    out = str(tmp_path / "out")
    arguments = [a.replace("HF", str(qwen3)).replace("step-0", f"{tmp_path}/step-0") for a in arguments]
    status, text = ranks.run(command, "convert", *[out if a == "out" else a for a in arguments], world=1)[0]
    assert status == 2 and words in text, text


def test_tensor_parallel_size_must_divide_the_key_value_heads(qwen3, monkeypatch, tmp_path):
    monkeypatch.setenv("WORLD_SIZE", "4")
    status, text = command("convert", "hf-to-mcore", qwen3, tmp_path / "step-0", "--parallel.tensor=4")
    assert status == 2 and "parallel.tensor = 4 does not divide the key/value heads: 2" in text


@pytest.mark.parametrize(
    "family, change, words",
    [
        ("qwen3", {"architectures": ["MambaForCausalLM"]}, ["MambaForCausalLM", *FAMILIES]),
        ("qwen3", {"use_sliding_window": True}, ["use_sliding_window = true", "expected false"]),
        ("qwen3", {"attention_bias": True}, ["attention_bias"]),
        ("qwen3", {"hidden_act": "gelu"}, ["hidden_act", "silu"]),
        ("qwen3", {"hidden_size": None}, ["'hidden_size' is missing"]),
        ("qwen3", {"quantization_config": {"bits": 4}}, ["quantization_config"]),
        ("mistral", {"sliding_window": 128}, ["sliding_window = 128", "max_position_embeddings = 256"]),
        ("llama2", {"rope_parameters": {"rope_type": "yarn", "factor": 4.0}}, ["'yarn'", "llama3"]),
        ("llama2", {"mlp_bias": True}, ["mlp_bias"]),
        ("qwen3-moe", {"decoder_sparse_step": 2}, ["decoder_sparse_step = 2", "expected 1"]),
        ("qwen3-moe", {"num_experts_per_tok": 9}, ["num_experts_per_tok = 9"]),
    ],
)
def test_a_config_that_is_not_built_is_refused_by_its_key(tmp_path, family, change, words):
    import transformers

    architecture, own = families.FAMILIES[family]
    config = getattr(transformers, architecture).config_class(
        **{**families.COMMON, **own}, architectures=[architecture]
    )
    config.save_pretrained(tmp_path)
    assert HFConfig.read(tmp_path).architecture == architecture
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(UserError) as error:
        HFConfig.read(tmp_path)
    assert all(word in str(error.value) for word in [str(path), *words]), error.value


def test_a_window_as_long_as_the_context_is_accepted(tmp_path):
    from transformers import MistralConfig

    MistralConfig(**{**families.COMMON, "sliding_window": 256}, architectures=["MistralForCausalLM"]).save_pretrained(
        tmp_path
    )
    assert HFConfig.read(tmp_path).context == 256


def _first_shard(folder):
    return sorted(folder.glob("*.safetensors"))[0]


@pytest.mark.parametrize(
    "spoil, words",
    [
        (lambda folder: _first_shard(folder).unlink(), "not found, though model.safetensors.index.json names it"),
        (lambda folder: _first_shard(folder).write_bytes(b"\xff" * 100), "not a readable safetensors file"),
        (lambda folder: (folder / weight_files.INDEX).write_text("{}"), "weight_map"),
        (lambda folder: save_file({"x": torch.zeros(1)}, _first_shard(folder)), "is not in it"),
        (
            lambda folder: save_file(
                {n: t.to(torch.int8) for n, t in load_file(_first_shard(folder)).items()}, _first_shard(folder)
            ),
            "dtype I8",
        ),
    ],
    ids=["missing shard", "corrupt header", "index", "foreign shard", "quantised"],
)
def test_spoilt_files_are_refused_by_name(tmp_path, spoil, words):
    folder = families.make("qwen2", tmp_path / "qwen2", max_shard_size="40KB")
    with weight_files.HFReader(folder) as reader:
        expected = {name: reader.shape(name) for name in reader.files}
        reader.check(expected, "Qwen2ForCausalLM")
    spoil(folder)
    with pytest.raises(UserError, match=words) as error, weight_files.HFReader(folder) as reader:
        reader.check(expected, "Qwen2ForCausalLM")
    assert str(folder) in str(error.value)


def test_llama3_frequencies_equal_transformers(ranks, tmp_path):
    """Use Llama 3.2's own values, for which most megatron-core defaults would do, and others."""
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    for name, values in {"3.2": (32.0, 1.0, 4.0, 8192), "other": (3.0, 1.5, 2.5, 100)}.items():
        rope = dict(
            zip(
                ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
                values,
                strict=True,
            )
        )
        own = {"tie_word_embeddings": True, "rope_parameters": {"rope_type": "llama3", "rope_theta": 500000.0, **rope}}
        families.FAMILIES[name] = ("LlamaForCausalLM", own)
        folder = families.make(name, tmp_path / name)
        expected, _ = ROPE_INIT_FUNCTIONS["llama3"](LlamaConfig.from_pretrained(folder))
        np.testing.assert_array_equal(ranks.run(_frequencies, folder, world=1)[0], expected.numpy())
        del families.FAMILIES[name]


def _frequencies(folder):
    from tests.helpers import small

    return small.learner(folder, {}, train=False).modules[0].rotary_pos_emb.inv_freq.numpy().copy()
