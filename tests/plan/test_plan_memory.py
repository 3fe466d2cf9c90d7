"""The planner against the resident memory of real steps on CPU ranks: at most 15 % apart.

Models of 80 to 170 MB of weights at packs of 512 and 1024 tokens: the plan counts 450 MB and more, next to which
torch's late imports (40 MB, counted) weigh little. glibc is left to itself, as a user's is: it keeps pages of freed
tensors, up to 32 MB each, for later. The plan counts a share for them: no step needs that memory, and no GPU has it
(torch's own allocator keeps blocks there).
"""

import json
from pathlib import Path

import pytest

from pctrain.config.load import read
from pctrain.plan import planner
from pctrain.plan.gpus import Gpu
from pctrain.plan.options import PlanOptions
from tests.helpers.peak_memory import on_ranks
from tests.helpers.plan_models import SMALL_EXPERTS, write_model

PROGRAM = str(Path(__file__).with_name("step_memory.py"))
SMALL = {
    "hidden_size": 512,
    "intermediate_size": 2048,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "vocab_size": 4000,
    "max_position_embeddings": 1024,
}
LARGER = SMALL | {"num_hidden_layers": 8, "vocab_size": 8000}
EXPERTS = LARGER | SMALL_EXPERTS | {"head_dim": 64, "num_hidden_layers": 6}
# Its rates do not matter here, and measuring them takes a while.
CPU = Gpu("cpu", 1e12, 1e11, 1e11, 1e10, 1e9, 1e9, "none")


def _apart(monkeypatch, folder, model, kind, world, rows, length, *options, save=False):
    """Return (measured - planned) / planned for each stage; of steps alone, or with a checkpoint after them."""
    monkeypatch.setattr(planner, "find", lambda name, ranks: CPU)
    path = write_model(folder / "model", **model)
    batch = (
        [f"--sft.batch_size={rows}"]
        if kind == "sft"
        else [f"--rl.prompts={rows // 4}", "--rl.group=4", "--rollout.max_response=60"]
    )
    typed = [f"--model.path={path}", *batch, *options]
    asked = {"options": typed, "kind": kind, "rows": rows, "length": length, "save": None}
    if save:
        (folder / "checkpoint").mkdir()
        asked["save"] = str(folder / "checkpoint")
    (folder / "asked.json").write_text(json.dumps(asked))
    plan = planner.Planner.of(read(None, typed), PlanOptions(gpus=world, gpu="cpu", kind=kind), ()).as_configured()
    measured = on_ranks(PROGRAM, folder / "asked.json", world=world)
    stages = plan.layout.parallel.pipeline
    moments = [moment for moment in plan.memory.moments if save or moment.phase != "save"]
    planned = [max(moment.total for moment in moments if moment.stage == stage) for stage in range(stages)]
    above = [
        max(memory.peak - memory.base for memory in measured[stage * world // stages : (stage + 1) * world // stages])
        for stage in range(stages)
    ]
    print(f"measured {[round(value / 1e6) for value in above]} MB, planned {[round(value / 1e6) for value in planned]}")
    return [(a - b) / b for a, b in zip(above, planned, strict=True)]


def test_a_step_of_sft(monkeypatch, tmp_path):
    apart = _apart(monkeypatch, tmp_path, SMALL, "sft", 1, 4, 128, "--sft.token_budget=512")
    assert max(map(abs, apart)) <= 0.15, apart


@pytest.mark.full
@pytest.mark.parametrize("world", [1, 2])
def test_a_save(monkeypatch, tmp_path, world):
    apart = _apart(monkeypatch, tmp_path, SMALL, "sft", world, 4, 128, "--sft.token_budget=512", save=True)
    assert max(map(abs, apart)) <= 0.15, apart


@pytest.mark.full
@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    ("model", "kind", "world", "rows", "options"),
    [
        pytest.param(LARGER, "sft", 1, 8, ["--parallel.recompute=full"], id="recompute"),
        pytest.param(LARGER, "sft", 1, 8, ["--parallel.recompute=selective"], id="selective"),
        pytest.param(LARGER, "sft", 2, 16, [], id="DP2"),
        pytest.param(LARGER, "sft", 2, 8, ["--parallel.tensor=2", "--parallel.sequence_parallel=true"], id="TP2"),
        pytest.param(LARGER, "sft", 2, 32, ["--parallel.pipeline=2"], id="PP2"),
        pytest.param(
            LARGER, "sft", 2, 32, ["--parallel.pipeline=2", "--parallel.virtual_pipeline=2"], id="PP2 virtual"
        ),
        pytest.param(EXPERTS, "sft", 1, 8, [], id="experts"),
        pytest.param(EXPERTS, "sft", 2, 16, ["--parallel.expert=2"], id="EP2"),
        pytest.param(LARGER, "rl", 1, 8, [], id="RL"),
        pytest.param(LARGER, "rl", 1, 8, ["--rl.algorithm.kl_coef=0.1"], id="RL with a reference"),
        pytest.param(LARGER, "rl", 2, 16, [], id="RL DP2"),
    ],
)
def test_other_steps(monkeypatch, tmp_path, model, kind, world, rows, options):
    apart = _apart(monkeypatch, tmp_path, model, kind, world, rows, 128, f"--{kind}.token_budget=1024", *options)
    assert max(map(abs, apart)) <= 0.15, apart
