"""The planner's parameters and buffers are exactly those of real megatron-core shards, at up to 1024 ranks."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from pctrain.config.tree import Config, ModelConfig, ParallelConfig
from pctrain.hf.config import HFConfig
from pctrain.plan.gpus import GPUS
from pctrain.plan.memory import held_always
from pctrain.plan.shapes import Layout, buffers, chunks
from tests.helpers.plan_models import LLAMA_3B, write_config
from tests.helpers.plan_models import MODELS as PUBLISHED

PROGRAM = Path(__file__).with_name("meta_shards.py")
# Nothing of it is a multiple of what buffers are padded to.
ODD = LLAMA_3B | {
    "hidden_size": 36,
    "head_dim": 12,
    "num_attention_heads": 3,
    "num_key_value_heads": 1,
    "intermediate_size": 50,
    "num_hidden_layers": 4,
    "vocab_size": 331,
}
MODELS = PUBLISHED | {"odd": ODD}
# (model, ranks, dtype, layout). Every tensor and expert parallel rank of a stage holds equally much.
CASES = [
    ("qwen-7b", 8, "bfloat16", {"tensor": 2, "sequence_parallel": True, "overlap_grad_reduce": True}),
    (
        "qwen-7b",
        1024,
        "bfloat16",
        {"tensor": 4, "pipeline": 8, "first_stage_layers": 2, "last_stage_layers": 2, "sequence_parallel": True},
    ),
    ("qwen-7b", 96, "float32", {"tensor": 4, "pipeline": 4, "context": 2}),
    ("qwen-7b", 64, "bfloat16", {"tensor": 2, "pipeline": 4, "virtual_pipeline": 7, "overlap_grad_reduce": True}),
    ("llama-3b", 24, "bfloat16", {"tensor": 2, "pipeline": 4, "virtual_pipeline": 7, "overlap_grad_reduce": True}),
    ("llama-3b", 8, "float32", {}),
    (
        "qwen-30b-a3b",
        128,
        "bfloat16",
        {"tensor": 2, "pipeline": 4, "expert": 8, "sequence_parallel": True, "overlap_grad_reduce": True},
    ),
    (
        "qwen-30b-a3b",
        1024,
        "bfloat16",
        {"tensor": 4, "pipeline": 8, "expert": 32, "virtual_pipeline": 3, "sequence_parallel": True},
    ),
    ("odd", 12, "bfloat16", {"pipeline": 2, "virtual_pipeline": 2, "overlap_grad_reduce": True}),
    ("qwen-30b-a3b", 48, "bfloat16", {"pipeline": 3, "expert": 16, "first_stage_layers": 15, "last_stage_layers": 13}),
]
FAST = (1, 4, 6, 8)


def _ranks(world, layout):
    """The first and the last of the first two and the last two stages: they differ in their places in every group."""
    stages, each = layout.get("pipeline", 1), world // layout.get("pipeline", 1)
    return sorted(
        {rank for s in {0, 1, stages - 2, stages - 1} & set(range(stages)) for rank in (s * each, (s + 1) * each - 1)}
    )


@pytest.fixture(scope="module")
def shards(request, tmp_path_factory):
    """{(case, rank): what the real shard holds}; one process builds those of all tests that were chosen."""
    chosen = sorted(
        {
            item.callspec.params["index"]
            for item in request.session.items
            if item.path == request.path and "shard" in item.name
        }
    )
    folder = tmp_path_factory.mktemp("shards")
    models = {name: write_config(folder / name, shape) for name, shape in MODELS.items()}
    asked = [(index, rank) for index in chosen for rank in _ranks(CASES[index][1], CASES[index][3])]
    cases = [
        {
            "folder": str(models[CASES[i][0]]),
            "world": CASES[i][1],
            "dtype": CASES[i][2],
            "rank": rank,
            "parallel": CASES[i][3],
        }
        for i, rank in asked
    ]
    (folder / "cases.json").write_text(json.dumps(cases))
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, PROGRAM, folder / "cases.json"], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    return models, dict(zip(asked, lines, strict=True))


@pytest.mark.parametrize(
    "index",
    [
        pytest.param(
            index,
            id=f"{name}-{world}-{'-'.join(map(str, layout.values()))}",
            marks=[] if index in FAST else [pytest.mark.full],
        )
        for index, (name, world, _, layout) in enumerate(CASES)
    ],
)
def test_a_shard_holds_what_the_plan_says(shards, index):
    models, found = shards
    name, world, dtype, parallel = CASES[index]
    hf, layout = HFConfig.read(models[name]), Layout(ParallelConfig(**parallel), world)
    config = Config(model=ModelConfig(path=models[name], dtype=dtype))
    stages = set()
    for rank in _ranks(world, parallel):
        real = found[index, rank]
        stage = real["stage"]
        stages.add(stage)
        assert real["parameters"] == [chunk.parameters for chunk in chunks(hf, layout, stage)], rank
        planned = buffers(hf, layout, stage)
        assert (real["dense"], real["expert"]) == (planned.dense, planned.expert), rank
        held = held_always(hf, config, layout, GPUS["h200"], stage, 0.0)
        assert (real["weight_bytes"], real["gradient_bytes"]) == (held["weights"], held["gradients"]), rank
        # Its share of a buffer may be padding, which has no moments: 12 (float32: 8) bytes an element of at most a few
        # thousand.
        missing = held["optimizer"] - real["optimizer_bytes"]
        assert 0 <= missing <= 12 * 64 * 12 * layout.parallel.virtual_pipeline * hf.layers, (rank, missing)
    assert {0, layout.parallel.pipeline - 1} <= stages
