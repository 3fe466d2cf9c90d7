"""Peak host memory of `pctrain convert`: this rank's shard and one tensor, and what the program itself needs."""

import filecmp
import json
import math
import shutil

import pytest
import torch

from tests.helpers.peak_memory import measure

MB = 10**6


def _model(folder, *, hidden, ffn, layers, heads, kv_heads, vocab, shard_bytes=10**12):
    """Write a Llama in float32, tensor by tensor, with all rows and columns different; return its shapes."""
    from pctrain.core import weights
    from pctrain.hf import weight_files
    from pctrain.hf.config import HFConfig

    folder.mkdir()
    (folder / "config.json").write_text(
        json.dumps(
            {
                "architectures": ["LlamaForCausalLM"],
                "model_type": "llama",
                "dtype": "float32",
                "hidden_act": "silu",
                "rms_norm_eps": 1e-5,
                "max_position_embeddings": 2048,
                "tie_word_embeddings": False,
                "eos_token_id": 2,
                "rope_theta": 1e4,
                "hidden_size": hidden,
                "intermediate_size": ffn,
                "num_hidden_layers": layers,
                "num_attention_heads": heads,
                "num_key_value_heads": kv_heads,
                "vocab_size": vocab,
            }
        )
    )
    shapes = {name: shape for unit in weights.units(HFConfig.read(folder), te=False) for name, shape in unit.hf.items()}
    row, column = torch.randn(max(hidden, ffn)), torch.randn(max(hidden, ffn, vocab), 1)
    entries = [weight_files.Entry(name, torch.float32, shape) for name, shape in shapes.items()]
    tensors = (
        (name, row[: shape[-1]] * column[: shape[0]] if len(shape) == 2 else row[: shape[0]])
        for name, shape in shapes.items()
    )
    weight_files.write(folder, entries, tensors, shard_bytes=shard_bytes)
    return list(shapes.values())


def _shard(shapes, world=1):
    """Bytes of one tensor parallel rank's parameters in float32; norms are on all ranks."""
    return 4 * sum(math.prod(shape) // (world if len(shape) == 2 else 1) for shape in shapes)


def _largest(shapes):
    return 4 * max(map(math.prod, shapes))


@pytest.mark.full
def test_conversion_holds_no_second_copy_of_the_model(tmp_path):
    # Nearly all of it is feed-forward, whose first matrices megatron-core stores in halves: a copy of them is 300 MB.
    shapes = _model(tmp_path / "hf", hidden=512, ffn=12288, layers=6, heads=8, kv_heads=4, vocab=1000)
    # Besides shard and tensor: pieces of files, buffers, late imports. 20 to 150 MB measured; 250 if halves are copied.
    allowed = _shard(shapes) + _largest(shapes) + 240 * MB
    [there] = measure("convert", "hf-to-mcore", tmp_path / "hf", tmp_path / "step-0")
    [back] = measure("convert", "mcore-to-hf", tmp_path / "step-0", tmp_path / "out", f"--model.path={tmp_path / 'hf'}")
    above = [(memory.peak - memory.base) // MB for memory in (there, back)]
    print(f"above the imports: {above[0]} MB there, {above[1]} MB back; allowed {allowed // MB} MB")
    assert max(above) * MB <= allowed
    assert filecmp.cmp(tmp_path / "hf" / "model.safetensors", tmp_path / "out" / "model.safetensors", shallow=False)


@pytest.fixture(scope="module")
def billion(tmp_path_factory):
    """(directory, shapes) of 1.1 billion parameters, 4.4 GB in files of 1 GB."""
    folder = tmp_path_factory.mktemp("billion") / "hf"
    yield folder, _model(folder, hidden=2048, ffn=5632, layers=22, heads=32, kv_heads=4, vocab=32000, shard_bytes=10**9)
    shutil.rmtree(folder)


@pytest.mark.full
@pytest.mark.parametrize("world", [1, 2], ids=["single", "TP2"])
def test_a_billion_parameters_within_shard_and_one_tensor_and_1_gb(billion, tmp_path, world):
    source, shapes = billion
    allowed = _shard(shapes, world) + _largest(shapes) + 1000 * MB  # the imports are in it
    try:
        there = measure("convert", "hf-to-mcore", source, tmp_path / "step-0", world=world)
        back = measure(
            "convert", "mcore-to-hf", tmp_path / "step-0", tmp_path / "out", f"--model.path={source}", world=world
        )
    finally:
        shutil.rmtree(tmp_path)  # 9 GB
    peaks = {name: [memory.peak // MB for memory in memories] for name, memories in (("there", there), ("back", back))}
    print(f"peak in MB: {peaks}; allowed {allowed // MB}")
    assert max(max(of) for of in peaks.values()) * MB <= allowed
