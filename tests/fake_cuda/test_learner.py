"""The learner on a fake CUDA device: no mixed devices, pinned waits of the host, and memory as the plan says.

Values are not computed there. Shapes, dtypes, devices, the order of calls, and the bytes that are held are real.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pctrain.config.load import read
from pctrain.plan import planner
from pctrain.plan.options import PlanOptions
from pctrain.tools.gpu_check.expected import SYNCS_PER_MICRO_BATCH, SYNCS_PER_STEP
from tests.fake_cuda import build
from tests.fake_cuda.reports import CPU_TENSOR, ITEM, Asked, Report, Table, difference, report, start
from tests.helpers.plan_models import write_model

pytestmark = [
    pytest.mark.skipif(build.missing() is not None, reason=str(build.missing())),
    pytest.mark.timeout(900),
]
full = pytest.mark.full

TINY = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 400,
    "max_position_embeddings": 8192,
}
SMALL = TINY | {
    "hidden_size": 512,
    "intermediate_size": 2048,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "vocab_size": 4000,
}
LARGER = SMALL | {"hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 6, "vocab_size": 8000}
MODELS = {"tiny": TINY, "tiny, 4 layers": TINY | {"num_hidden_layers": 4}, "small": SMALL, "larger": LARGER}
TP2 = ("--parallel.tensor=2", "--parallel.sequence_parallel=true")
# With 4 data parallel ranks, a pass gathers its values from all of them in one call: two copies of this rank's object,
# one of each rank's, three comparisons and one reading to find the largest size, and one for the size of each.
GATHER_OF_FOUR: Table = {
    "copy to the device: pctrain/core/learner.py:Learner._token_values": 2,
    "copy to the host: pctrain/core/learner.py:Learner._token_values": 4,
    "item: pctrain/core/learner.py:Learner._token_values": 8,
}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Return a function of a name in MODELS that writes the model, once."""
    folder = tmp_path_factory.mktemp("models")

    def written(name: str) -> Path:
        path = folder / name.replace(", ", "-").replace(" ", "-")
        return path if path.exists() else write_model(path, **MODELS[name])

    return written


def _options(model: Path, tokens: int, *more: str, dtype: str = "bfloat16", spec: str = "torch-varlen") -> list[str]:
    return [
        f"--model.path={model}",
        f"--model.dtype={dtype}",
        f"--model.spec={spec}",
        f"--sft.token_budget={tokens}",
        f"--rl.token_budget={tokens}",
        "--rl.algorithm.kl_coef=0.1",
        "--rl.updates=2",
        "--rl.group=4",
        f"--rollout.max_response={tokens * 5 // 8}",
        *more,
    ]


def _unexpected(found: Report, asked: Asked, phases: list[str], extra: dict[str, Table] | None = None) -> list[str]:
    """Return a line for every wait of these phases that differs from the pinned ones."""
    lines = []
    for phase in phases:
        steps = 2 if phase == "rl" else 1  # rl.updates
        per_micro_batch, per_step = found.per_micro_batch_and_step(phase, asked.packs, steps)
        pinned = SYNCS_PER_STEP[phase] | (extra or {}).get(phase, {})
        lines += difference(f"{phase}, per micro-batch", per_micro_batch, SYNCS_PER_MICRO_BATCH[phase], found)
        lines += difference(f"{phase}, per step", per_step, pinned, found)
    return lines


def test_an_sft_step_waits_only_where_it_is_pinned(models, tmp_path):
    asked = Asked(_options(models("tiny"), 256), ["sft"], str(tmp_path / "checkpoint"))
    found = report(tmp_path, asked)
    assert "torch-varlen" in found.described
    assert not _unexpected(found, asked, ["sft"])


@full
@pytest.mark.parametrize("world", [1, 8])
@pytest.mark.parametrize(("dtype", "spec"), [("bfloat16", "torch-varlen"), ("float32", "torch")])
def test_the_whole_learner(models, tmp_path, dtype, spec, world):
    layout = TP2 if world > 1 else ()
    options = _options(models("tiny"), 256, "--rl.reference_offload=true", *layout, dtype=dtype, spec=spec)
    phases = ["sft", "logprob", "rl", "weights", "checkpoint"]
    asked = Asked(options, phases, str(tmp_path / "checkpoint"), world)
    found = report(tmp_path, asked)
    described = f"layer spec {spec}; {world} rank(s): tensor {2 if layout else 1} x pipeline 1 x context 1 x data "
    assert described in found.described
    extra = {"logprob": GATHER_OF_FOUR} if world > 1 else {}
    assert not _unexpected(found, asked, ["sft", "logprob", "rl"], extra)
    # The passes of an RL step: old log-probs of both updates' rows, and the reference, which comes from pinned memory.
    per_micro_batch, per_step = found.per_micro_batch_and_step("rl passes", asked.packs)
    once, passes = SYNCS_PER_MICRO_BATCH["logprob"], 2
    assert per_micro_batch == {key: count * passes * 2 for key, count in once.items()}
    assert per_step == {key: count * passes for key, count in extra.get("logprob", {}).items()}
    written = {path.name for path in (tmp_path / "checkpoint").iterdir()}
    assert {".metadata", "common.pt", "metadata.json", "__0_0.distcp"} <= written
    assert not found.waits_in("weights")
    if world > 1:  # one gather of a bucket, not one of each parameter
        gathers = {name: count for phase, name, count in found.collectives if phase == "weights"}
        assert gathers == {"_allgather_base_": 1}
        reduced = {phase for phase, name, _ in found.collectives if name == "reduce_scatter_tensor_coalesced_"}
        assert {f"sft {packs}" for packs in asked.packs} <= reduced


@full
def test_no_wait_for_each_layer_or_parameter(models, tmp_path):
    asked = Asked(_options(models("tiny, 4 layers"), 256), ["sft", "logprob"], str(tmp_path / "checkpoint"))
    found = report(tmp_path, asked)
    assert found.parameters == 3 + 4 * 6
    assert not _unexpected(found, asked, ["sft", "logprob"])


@full
def test_a_value_that_a_loss_reads_is_named(models, tmp_path):
    asked = Asked(_options(models("tiny"), 256), ["sft"], str(tmp_path / "checkpoint"), fault=ITEM)
    [line] = _unexpected(report(tmp_path, asked), asked, ["sft"])
    assert line.startswith("sft, per micro-batch: item: tests/fake_cuda/learner_program.py:sft.<locals>.token_loss (")
    assert line.endswith("counted 1, pinned 0")


@full
def test_a_cpu_tensor_in_a_loss_is_refused(models, tmp_path):
    asked = Asked(_options(models("tiny"), 256), ["sft"], str(tmp_path / "checkpoint"), fault=CPU_TENSOR)
    done = start(tmp_path, asked)
    assert done.returncode != 0
    assert "FakeTensorDeviceMismatchError" in done.stderr
    assert "in token_loss" in done.stderr


# What the plan calls a phase -> what the program does in it, with two micro-batches.
MOMENTS = {
    "sft": {"load": "build", "update": "sft 2"},
    "rl": {"logprob": "rl passes 2", "reference": "rl passes 2", "update": "rl 2"},
}


@full
@pytest.mark.parametrize(
    ("name", "world", "tokens", "options"),
    [
        pytest.param("small", 1, 4096, [], id="one rank"),
        pytest.param("larger", 1, 2048, ["--rl.reference_offload=true"], id="one rank, larger"),
        pytest.param("small", 8, 2048, [*TP2], id="TP2 DP4"),
        pytest.param("larger", 8, 4096, [*TP2, "--parallel.recompute=selective"], id="TP2 DP4, larger, selective"),
        pytest.param("larger", 8, 4096, [*TP2, "--parallel.recompute=full"], id="TP2 DP4, larger, recompute"),
    ],
)
def test_memory_is_what_the_plan_says(models, tmp_path, name, world, tokens, options):
    typed = _options(models(name), tokens, f"--rl.prompts={8 * world}", *options)
    asked = Asked(typed, ["sft", "rl", "weights"], str(tmp_path / "checkpoint"), world, packs=(1, 2))
    peaks = report(tmp_path, asked).peaks
    rows = []
    for kind, phases in MOMENTS.items():
        memory = _plan(typed, world, kind).memory
        planned = {phase: _of_the_learner(memory.of(phase)) for phase in phases}
        both = {done: max(planned[phase] for phase in phases if phases[phase] == done) for done in phases.values()}
        rows += [(kind, done, peaks[done], bytes_) for done, bytes_ in both.items()]
    # The plan also counts what the engine holds while it loads.
    rows.append(("rl", "weights", peaks["weights"], _of_the_learner(_plan(typed, world, "rl").memory.of("swap"))))
    print(json.dumps([(kind, phase, a >> 20, round(b) >> 20, f"{a / b - 1:+.1%}") for kind, phase, a, b in rows]))
    apart = {(kind, phase): round(a / b - 1, 3) for kind, phase, a, b in rows}
    too_far = {key: value for key, value in apart.items() if abs(value) > (0.15 if key[1] == "weights" else 0.05)}
    assert not too_far, apart


def _plan(options: list[str], world: int, kind: str) -> planner.Plan:
    wanted = PlanOptions(gpus=world, gpu="h200", kind=kind)
    plan = planner.Planner.of(read(None, options), wanted, ()).as_configured()
    assert isinstance(plan, planner.Plan), plan
    return plan


def _of_the_learner(moment) -> float:
    """Return the bytes of a moment without the engine and what CUDA itself takes."""
    return sum(size for name, size in moment.parts.items() if name not in ("reserve", "engine"))
