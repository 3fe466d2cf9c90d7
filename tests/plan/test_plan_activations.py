"""The planner's activations against the tensors that the real model saves for its backward pass."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from pctrain.config.tree import Config, ModelConfig, ParallelConfig
from pctrain.hf.config import HFConfig
from pctrain.plan.activations import FP32, Activations, layer_spec
from pctrain.plan.gpus import GPUS, Gpu
from pctrain.plan.shapes import Layout
from tests.helpers.plan_models import SMALL_EXPERTS, write_config

PROGRAM = Path(__file__).with_name("saved_tensors.py")
TOKENS = 1024
# No two sizes are equal, so that no part is mistaken for another.
DENSE = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 512,
    "intermediate_size": 1792,
    "num_attention_heads": 10,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "vocab_size": 4000,
    "max_position_embeddings": 1024,
}
NORMED = DENSE | {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3"}
EXPERTS = NORMED | SMALL_EXPERTS
MODELS = {"dense": DENSE, "normed": NORMED, "experts": EXPERTS}
WHOLE, SEVERAL = [TOKENS], [300, 400, 124, 200]
CPU = Gpu("cpu", 1e12, 1e11, 1e11, 1e10, 1e9, 1e9, "none")
SHARDED = {"tensor": 2, "sequence_parallel": True}
# (model, dtype, spec, device, layout, lengths, fused activation)
CASES = [
    ("dense", "bfloat16", "torch-varlen", "meta", {}, SEVERAL, False),
    ("normed", "bfloat16", "torch-varlen", "meta", {}, SEVERAL, False),
    ("dense", "bfloat16", "torch-varlen", "meta", {"tensor": 2}, SEVERAL, False),
    ("dense", "bfloat16", "torch-varlen", "meta", SHARDED, SEVERAL, False),
    ("dense", "bfloat16", "torch-varlen", "meta", {"recompute": "selective"}, SEVERAL, False),
    ("normed", "bfloat16", "torch-varlen", "meta", {"recompute": "selective"}, SEVERAL, False),
    ("dense", "bfloat16", "torch-varlen", "meta", {"recompute": "full"}, SEVERAL, False),
    ("dense", "bfloat16", "torch", "meta", {}, WHOLE, False),
    ("dense", "float32", "torch", "meta", SHARDED, WHOLE, False),
    ("normed", "float32", "torch", "meta", {}, SEVERAL, False),
    ("dense", "float32", "torch", "cpu", {}, WHOLE, False),
    ("dense", "bfloat16", "torch", "cpu", {}, WHOLE, False),
    ("normed", "float32", "torch", "cpu", {}, WHOLE, False),
    ("dense", "float32", "torch", "cpu", {"recompute": "selective"}, WHOLE, False),
    ("experts", "float32", "torch", "cpu", {}, WHOLE, False),
]
FUSED = [("dense", "float32", "torch", "cpu", {}, WHOLE, True), ("experts", "float32", "torch", "cpu", {}, WHOLE, True)]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """{(case, layers): bytes that the real model saves}; one process counts all of them."""
    folder = tmp_path_factory.mktemp("saved")
    asked = [(case, layers) for case in range(len(CASES + FUSED)) for layers in (1, 2)]
    cases = []
    for index, layers in asked:
        name, dtype, spec, device, parallel, lengths, fused = (CASES + FUSED)[index]
        path = write_config(folder / f"{name}-{layers}", MODELS[name] | {"num_hidden_layers": layers})
        case = {"folder": str(path), "dtype": dtype, "spec": spec, "device": device, "parallel": parallel}
        cases.append(case | {"tokens": TOKENS, "lengths": lengths, "fused": fused})
    (folder / "cases.json").write_text(json.dumps(cases))
    done = subprocess.run(
        [sys.executable, PROGRAM, folder / "cases.json"],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.isdecimal()]
    return folder, dict(zip(asked, lines, strict=True))


@pytest.mark.parametrize("index", range(len(CASES)), ids=["-".join(map(str, case[:5])) for case in CASES])
def test_the_model_saves_what_the_plan_says(saved, index):
    folder, found = saved
    name, dtype, spec, device, parallel, _, _ = CASES[index]
    hf = HFConfig.read(folder / f"{name}-2")
    layout = Layout(ParallelConfig(**parallel), parallel.get("tensor", 1))
    gpu = CPU if device == "cpu" else GPUS["h200"]
    model = Config(model=ModelConfig(path=folder / f"{name}-2", dtype=dtype, spec=spec))
    planned = Activations(hf, model, layout, gpu, TOKENS, entropy=False)
    layer = found[index, 2] - found[index, 1]
    assert layer == pytest.approx(planned.layer(), rel=1e-3)
    # Once per pack: the rotation's tables (kept by the pack, not by autograd, if attention is recomputed), the input of
    # the final norm with its scale, and the token ids.
    tables = planned.angles() if parallel.get("recompute", "none") == "none" else 0.0
    final = planned.stream + planned.stream_tokens * FP32 + TOKENS * 8
    if device == "cpu" and dtype == "bfloat16":
        final += planned.stream * (2 * FP32 / planned.size - 1)
    assert found[index, 1] - layer == pytest.approx(tables + final, rel=1e-2)


@pytest.mark.parametrize("name", ["dense", "experts"])
def test_a_fused_activation_keeps_three_widths(saved, name):
    """megatron-core's fused functions, which run the feed-forward of the te spec and its experts."""
    folder, found = saved
    hf, layout = HFConfig.read(folder / f"{name}-2"), Layout(ParallelConfig(), 1)
    planned = []
    for spec, gpu in (("torch", CPU), ("te", GPUS["h200"])):
        model = Config(model=ModelConfig(path=folder / f"{name}-2", dtype="float32", spec=spec))
        planned.append(Activations(hf, model, layout, gpu, TOKENS, entropy=False).feed_forward())
    saved_less = []
    for fused in (False, True):
        index = (CASES + FUSED).index((name, "float32", "torch", "cpu", {}, WHOLE, fused))
        saved_less.append(found[index, 2] - found[index, 1])
    assert saved_less[0] - saved_less[1] == pytest.approx(planned[0] - planned[1], rel=1e-3)


def test_the_spec_that_is_planned():
    chosen = {
        (gpu.name, dtype): layer_spec(ModelConfig(dtype=dtype), gpu)
        for gpu in (CPU, GPUS["h200"])
        for dtype in ("float32", "bfloat16")
    }
    assert chosen == {
        ("cpu", "float32"): "torch",
        ("cpu", "bfloat16"): "torch",
        ("h200", "float32"): "torch",
        ("h200", "bfloat16"): "te",
    }
    assert layer_spec(ModelConfig(dtype="bfloat16", spec="torch-varlen"), GPUS["h200"]) == "torch-varlen"
