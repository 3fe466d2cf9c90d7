"""The paper's runs as configs.

Every number of the README's table is in its file, each file resolves for its GPUs, and small versions run.
"""

import json
import re
import shutil
from pathlib import Path

import pytest
import yaml

from pctrain.cli.main import main
from pctrain.config.load import load, read
from pctrain.plan.options import PlanOptions
from pctrain.plan.planner import Planner
from pctrain.study.stages import stages_of
from tests.helpers import tiny
from tests.helpers.plan_models import LLAMA_3B, QWEN_7B, write_config

FOLDER = Path(__file__).resolve().parents[2] / "configs" / "retu"
SHARED = {"sft.yaml", "rl.yaml", "qwen2.5-7b.yaml", "llama-3.2-3b.yaml", "rl-compare.yaml"}
TYING = {"eval.yaml", "study.yaml"}  # files that do not describe a single run
RUNS = sorted(path.name for path in FOLDER.glob("*.yaml") if path.name not in SHARED | TYING)
SETS = ["s1k", "easy102k", "uniform102k", "hard102k", "889k"]
ROWS = re.findall(
    r"^\| (.+?) \| `(\S+) = (\S+)` \| (\S+\.yaml) \| (paper|code) \|$", (FOLDER / "README.md").read_text(), re.M
)
MODELS = {"models/Qwen2.5-7B": QWEN_7B, "models/Llama-3.2-3B": LLAMA_3B}
GPUS = 8


def test_the_table_is_read_whole():
    lines = [line for line in (FOLDER / "README.md").read_text().splitlines() if line.startswith("| ") and "`" in line]
    assert len(ROWS) == len(lines) > 40 and len(RUNS) == 19


@pytest.mark.parametrize(("number", "key", "value", "file", "source"), ROWS, ids=[f"{row[3]}:{row[1]}" for row in ROWS])
def test_every_number_is_where_the_readme_says(number, key, value, file, source):
    found = read(FOLDER / file, [])
    for name in key.split("."):
        found = found[name] if isinstance(found, dict) else getattr(found, name)
    assert found == yaml.safe_load(value)


@pytest.fixture
def eight_gpus(tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", str(GPUS))
    monkeypatch.chdir(tmp_path)
    for folder, shape in MODELS.items():
        write_config(tmp_path / folder, shape)


@pytest.mark.parametrize("file", RUNS)
def test_every_run_resolves_for_its_gpus(file, eight_gpus):
    kind = file[:2] if file.startswith("rl") else "sft"
    config = load(FOLDER / file, [], sections=("run", "model", "parallel", "data", "rollout", "reward", "eval", kind))
    assert str(config.model.path) == ("models/Llama-3.2-3B" if "llama" in file else "models/Qwen2.5-7B")
    assert str(config.run.dir) == f"runs/retu/{file.removesuffix('.yaml')}"


@pytest.mark.parametrize("file", RUNS)
def test_every_run_fits_into_its_gpus(file, eight_gpus):
    """Check the planner's memory estimate; tests/plan compares the planner with measured models."""
    options = PlanOptions(gpus=GPUS, gpu="h100", kind="rl" if file.startswith("rl") else "sft")
    plan = Planner.of(read(FOLDER / file, []), options, ()).as_configured()
    assert plan.fits and plan.share < 0.92, (plan.name, plan.share)


def test_the_evaluation_and_the_study_resolve_for_their_gpus(eight_gpus):
    config = load(FOLDER / "eval.yaml", [], sections=("run", "model", "parallel", "rollout", "reward", "eval"))
    samples = {name: benchmark.samples or config.eval.samples for name, benchmark in config.eval.benchmarks.items()}
    assert samples == {"gsm8k": 1, "olympiadbench": 1, "math": 1, "minerva": 1, "aime24": 16, "aime25": 16}
    study = load(FOLDER / "study.yaml", [])
    stages = [stage.name for stage in stages_of(study)]
    assert stages == [f"{name}/{stage}" for name in SETS for stage in ("sft", "rl-early", "rl-stable", "rl-overfit")]
    for name in SETS:  # the study uses the set that the set's own SFT config trains on
        assert study.study.sets[name] == read(FOLDER / f"sft-{name}.yaml", []).data.train


# ---- scaled down: the same keys, smaller values ----

SMALL = [
    "--model.dtype=float32",
    "--parallel.tensor=1",
    "--parallel.sequence_parallel=false",
    "--run.tensorboard=false",
    "--data.overlong=error",
    "--rollout.max_prompt=64",
    "--rollout.max_response=24",
]
SMALL_SFT = [
    "--sft.steps=2",
    "--sft.batch_size=8",
    "--sft.token_budget=256",
    "--sft.val_every=1",
    "--sft.checkpoint_every=2",
    "--sft.optimizer.warmup=1",
]
SMALL_RL = [
    "--rl.steps=2",
    "--rl.prompts=4",
    "--rl.round_prompts=4",
    "--rl.max_rounds=2",
    "--rl.token_budget=1024",
    "--rl.eval_every=2",
    "--rl.checkpoint_every=2",
    "--rollout.tensor=1",
    "--rollout.kv_cache_mb=64",
    "--reward.workers=1",
]


def _families(sft_run, folder):
    """Return {family: model directory}: models of the test's size with the family's tokenizer."""
    import torch
    import transformers

    torch.manual_seed(3)
    qwen = folder / "qwen2"
    shape = json.loads((sft_run / "hf" / "config.json").read_text())
    sizes = (
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "max_position_embeddings",
        "eos_token_id",
    )
    transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**{name: shape[name] for name in sizes})).save_pretrained(
        qwen
    )
    for file in (sft_run / "hf").glob("tokenizer*"):
        shutil.copy(file, qwen / file.name)
    return {"qwen": qwen, "llama": sft_run / "hf"}


def _run(sft_run, folder, files):
    models = _families(sft_run, folder)
    data = [
        f"--data.{name}={sft_run}/data/{'train' if name == 'rl' else name}.jsonl"
        for name in ("train", "validation", "test", "rl")
    ]
    statuses = {}
    for file in files:
        model = models["llama" if "llama" in file else "qwen"]
        command, small = ("rl", SMALL_RL) if file.startswith("rl") else ("sft", SMALL_SFT)
        options = [*SMALL, *small, *data, f"--model.path={model}", f"--run.dir={folder / file}"]
        statuses[file] = main([command, "--config", str(FOLDER / file), *options])
    return statuses


def _check(folder, files):
    for file in files:
        train = tiny.metrics(folder / file, "train")
        assert [line["step"] for line in train] == [1, 2] and (folder / file / "hf" / "model.safetensors").exists(), (
            file
        )


@pytest.mark.parametrize(
    "files",
    [
        pytest.param(["sft-s1k.yaml"], id="one"),
        pytest.param([file for file in RUNS if file != "sft-s1k.yaml"], id="the others", marks=pytest.mark.full),
    ],
)
@pytest.mark.timeout(900)
def test_runs_scaled_down(ranks, sft_run, tmp_path, files):
    [statuses] = ranks.run(_run, sft_run, tmp_path, files, world=1, deadline=800)
    assert set(statuses.values()) == {0}, statuses
    _check(tmp_path, files)


def _evaluate(sft_run, folder, models):
    problems = f"{sft_run}/data/test.jsonl"
    benchmark = f"--eval.benchmarks={{gsm8k: {problems}, aime24: {{path: {problems}, samples: 2}}}}"
    return main(
        [
            "eval",
            *map(str, models),
            "--out",
            str(folder / "scores"),
            "--config",
            str(FOLDER / "eval.yaml"),
            "--model.dtype=float32",
            "--parallel.tensor=1",
            "--parallel.sequence_parallel=false",
            "--rollout.tensor=1",
            "--rollout.kv_cache_mb=64",
            "--eval.max_response=24",
            "--reward.workers=1",
            benchmark,
        ]
    )


@pytest.mark.full
@pytest.mark.timeout(300)
def test_the_evaluation_scaled_down(ranks, sft_run, tmp_path):
    models = [sft_run / "checkpoints" / "step-20", sft_run]
    [status] = ranks.run(_evaluate, sft_run, tmp_path, models, world=1, deadline=250)
    found = json.loads((tmp_path / "scores" / "results.json").read_text())
    assert status == 0 and [entry["benchmarks"]["aime24"]["samples"] for entry in found["models"]] == [2, 2]
    assert found["models"][1]["weighted"]["strict"]["score"] > found["models"][0]["weighted"]["strict"]["score"]


def _study(sft_run, folder):
    """Run SFT on each set from its own config into the study's folder, then the study.

    The study finds these runs and runs only RL from the best checkpoint.
    """
    data = [f"--data.{name}={sft_run}/data/{name}.jsonl" for name in ("validation", "test")]
    model, root = f"--model.path={sft_run}/hf", folder / "study"
    statuses = [
        main(
            [
                "sft",
                "--config",
                str(FOLDER / f"sft-{name}.yaml"),
                *SMALL,
                *SMALL_SFT,
                *data,
                model,
                f"--data.train={sft_run}/data/train.jsonl",
                f"--run.dir={root}/sets/{name}/sft",
            ]
        )
        for name in SETS
    ]
    sets = "{" + ", ".join(f"{name}: {sft_run}/data/train.jsonl" for name in SETS) + "}"
    study = [
        f"--run.dir={root}",
        f"--data.rl={sft_run}/data/train.jsonl",
        f"--study.sets={sets}",
        "--study.starts=[stable]",
    ]
    return [
        *statuses,
        main(["run", "--config", str(FOLDER / "study.yaml"), *SMALL, *SMALL_SFT, *SMALL_RL, *data, model, *study]),
    ]


@pytest.mark.full
@pytest.mark.timeout(900)
def test_the_study_scaled_down(ranks, sft_run, tmp_path):
    [statuses] = ranks.run(_study, sft_run, tmp_path, world=1, deadline=800)
    assert statuses == [0] * 6 and (tmp_path / "study" / "report" / "report.html").exists()
    for name in SETS:  # S1K keeps its own batch size, which the study's config would not give it
        folder = tmp_path / "study" / "sets" / name
        assert (folder / "sft" / "summary.json").exists() and len(list(folder.glob("rl-step-*/summary.json"))) == 1
    assert "weight_decay: 0.0001" in (tmp_path / "study" / "sets" / "s1k" / "sft" / "config.yaml").read_text()
