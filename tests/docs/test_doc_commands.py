"""Every command on the pages is run with small files, or parsed and its config resolved; a new one must be added here."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from pctrain.cli.main import COMMANDS
from pctrain.config import load as config_load
from tests.helpers import reader
from tests.helpers.doc_pages import GUIDES, ROOT, Shown, commands

SMALL = {
    "sft": (
        "--sft.epochs=null",
        "--sft.steps=2",
        "--sft.batch_size=8",
        "--sft.token_budget=512",
        "--sft.val_every=1",
        "--sft.checkpoint_every=2",
        "--sft.optimizer.warmup=0",
        "--run.tensorboard=false",
    ),
    "rl": (
        "--rl.steps=1",
        "--rl.prompts=4",
        "--rl.group=4",
        "--rl.round_prompts=4",
        "--rl.max_rounds=1",
        "--rl.token_budget=1024",
        "--rl.optimizer.warmup=0",
        "--rollout.max_prompt=64",
        "--rollout.max_response=16",
        "--rollout.kv_cache_mb=64",
        "--run.tensorboard=false",
    ),
    "eval": ("--rollout.kv_cache_mb=64", "--eval.max_response=8"),
    "data winrate": ("--rollout.kv_cache_mb=64", "--attempts=2"),
    "data rank": ("--sft.batch_size=8", "--sft.token_budget=512", "--sft.optimizer.warmup=0", "--seeds=0"),
}
SMALL["study"] = (
    *SMALL["sft"][:-1],
    *SMALL["rl"],
    "--study.sets={easy: easy.jsonl}",
    "--study.seeds=[0]",
    "--study.algorithms=[grpo]",
    "--study.starts=[stable]",
    "--study.checkpoints=[2]",
)

# ---- commands that are run, {command: options that make it small}, in the order of a reader of the pages

WITHOUT_MODEL = {
    "pctrain data dedup raw.parquet --out deduped.jsonl.zst": (),
    "pctrain data decontaminate deduped.jsonl.zst --against=math500.jsonl --against=aime.jsonl --out clean.jsonl": (),
    "pctrain data split clean.jsonl --out sets --validation=199": (),
    "pctrain data select rated.jsonl --take=hard --size=102000 --out hard.jsonl": (),
    "pctrain fit curves.json": (),
    "pctrain fit curves.csv --reach 80 --budget 500": ("--out=2.json",),
    "pctrain fit curves.json --points 0.71": ("--out=3.json",),
    "pctrain fit curves.json --method paper": ("--out=4.json",),
}
# A number or a folder of the page, and its replacement in the test.
CHANGED = {
    "runs/sft/checkpoints/step-720": "runs/mine/checkpoints/step-2",
    "'runs/rl/checkpoints/step-*'": "runs/mine-rl/checkpoints/step-1",
    "curves/curves.json": "curves.json",  # two scores, of a run of one step, are no curve
    "B runs/sft": "B runs/mine",
    "--validation=199": "--validation=20",
    "--size=102000": "--size=20",
    "step-100": "step-2",
    "--sft.steps=300": "--sft.steps=2",
    "--sft.val_every=20": "--sft.val_every=1",
    "--rollout.max_response=4096": "--rollout.max_response=8",
}
WITH_MODEL = {
    "pctrain data check 'data/*.parquet' --model.path=/models/Qwen2.5-0.5B": (),
    "pctrain convert hf-to-mcore /models/Qwen2.5-0.5B checkpoints/step-0 --verify": (),
    "pctrain sft --config mine.yaml": SMALL["sft"],
    "pctrain convert mcore-to-hf runs/mine/checkpoints/step-100 exported --model.path=/models/Qwen2.5-0.5B": (),
    "pctrain rl --config mine.yaml --run.dir=runs/mine-rl --model.checkpoint=runs/mine/checkpoints/step-100": SMALL[
        "rl"
    ],
    "pctrain show runs/mine-rl --step 1": (),
    "pctrain report runs/mine-rl": (),
    "pctrain sft --run.dir=runs/scratch --data.train=own.jsonl.gz --data.validation=heldout.jsonl --model.architecture.layers=4 "
    "--model.architecture.hidden=256": SMALL["sft"],
    "pctrain rl --config rl.yaml --reward.verifier=my_rewards:judge --reward.workers=2 --reward.timeout=10": (
        *SMALL["rl"],
        "--run.dir=runs/judged",
    ),
    "pctrain rl --config rl.yaml --rl.algorithm=my_algorithms:ReinforcePlusPlus --run.dir=runs/rpp": SMALL["rl"],
    "pctrain run --config study.yaml --dry-run": (),
    "pctrain eval models/Qwen2.5-7B runs/sft --out scores --config benchmarks.yaml": SMALL["eval"],
}
WITH_MODEL_LONG = {
    "pctrain eval runs/sft/checkpoints/step-720 'runs/rl/checkpoints/step-*' --out curves --config benchmarks.yaml": SMALL[
        "eval"
    ],
    "pctrain fit curves/curves.json --out fits.json": (),
    "pctrain report curves/curves.json --out curves-report": (),
    "pctrain data winrate sets/train.jsonl --out rated.jsonl --model.path=Qwen2.5-1.5B --rollout.max_response=4096": SMALL[
        "data winrate"
    ],
    "pctrain data rank --candidate=hard=hard.jsonl --candidate=all=sets/train.jsonl --data.validation=sets/validation.jsonl "
    "--model.path=Qwen2.5-0.5B --sft.steps=300 --sft.val_every=20 --out rank": SMALL["data rank"],
    "pctrain run --config study.yaml": SMALL["study"],
}
AT_PUBLISHED_SIZE = {  # of these no model is made
    "pctrain plan --config configs/retu/rl-pipeline.yaml --gpus 8 --gpu h100": (),
    "pctrain plan --gpus 128 --gpu h200 --model.path=Qwen2.5-7B --model.dtype=bfloat16 --sft.batch_size=512 --sft.token_budget=16384": (),
    "pctrain plan --config sft.yaml --gpus 64 --gpu a100-80 --parallel.tensor=4 --out plan.json --figure memory.png": (),
}
ON_TWO_RANKS = {
    "torchrun --standalone --nproc-per-node 2 -m pctrain sft --config configs/quickstart.yaml --run.dir=runs/tp2 --parallel.tensor=2 "
    "--parallel.sequence_parallel=true": (
        "--sft.steps=2",
        "--sft.val_every=2",
        "--sft.eval_every=0",
        "--sft.optimizer.warmup=0",
    ),
}
RUN = WITHOUT_MODEL | WITH_MODEL | WITH_MODEL_LONG | AT_PUBLISHED_SIZE | ON_TWO_RANKS

# ---- commands that other tests run

ELSEWHERE = {
    "bash launch/quickstart.sh": "tests/launch/test_setup.py::test_the_quick_start_passes_options_on_and_names_the_report",
    "bash launch/test.sh": "tests/launch/test_setup.py::test_the_test_command_runs_the_fast_tier_and_full_runs_all",
    "pctrain run --config configs/quickstart.yaml": "tests/e2e/test_quickstart.py::test_rl_gains_ten_points_from_the_validation_minimum_in_ten_minutes",
    "python launch/dependencies.py '>' docs/dependencies.md": "tests/launch/test_dependencies.py::test_the_page_was_made_by_it",
    "python -m benchmarks.ceilings": "tests/ceiling/test_ceiling_benchmark.py::test_",
    "python -m pctrain.config.help '>' docs/config.md": "tests/config/test_config.py::test_",
    "PCTRAIN_DEVICE=gpu bash launch/setup.sh": "tests/launch/test_setup.py::test_gpu_packages",
    "pip install ./kernels": "tests/docs/test_doc_commands.py::test_the_kernels_install_alone",
    "PCTRAIN_TEST_EXTRAS=1 bash launch/setup.sh": "tests/launch/test_setup.py::test_the_tests_get_their_extras_once",
    "bash launch/lint.sh": "tests/launch/test_setup.py::test_lint_runs_every_check",
    "bash launch/test.sh --full": "tests/launch/test_setup.py::test_the_test_command_runs_the_fast_tier_and_full_runs_all",
    "bash launch/test.sh --avx2": "tests/launch/test_setup.py::test_the_test_command_runs_the_fast_tier_and_full_runs_all",
    "python -m pytest tests/rl tests/core -m 'not full'": "tests/docs/test_doc_commands.py::test_every_command_",
    "python -m pytest tests/kernels": "tests/kernels/test_compile_gate.py::test_",
    "python kernels/benchmarks/run_all.py": "tests/kernels/test_benchmarks.py::test_",
    "python launch/gpu_check.py": "tests/launch/test_gpu_check.py::test_",
    "python launch/gpu_check.py --compare gpu-check/results.jsonl": "tests/launch/test_gpu_check.py::test_",
    "python launch/constraints.py": "tests/launch/test_constraints.py::test_",
    "pctrain doctor --full": "tests/tools/test_gpu_check.py::test_doctor_full_",
    "python kernels/benchmarks/compile_report.py": "tests/kernels/test_compile_gate.py::test_",
}
# Parsed, and their configs resolved, by the tests below: what needs GPUs, nodes, Slurm or Docker.
LAUNCHED = re.compile(r"([A-Z_]+=\S+ )*(launch/torchrun\.sh|sbatch .*launch/slurm\.sbatch|torchrun .*-m pctrain) ")
SHOWN = [shown for page in GUIDES for shown in commands(page)]
LAUNCHES = list(
    {
        shown.text: shown
        for shown in SHOWN
        if LAUNCHED.match(f"{shown.text} ") and not shown.is_form and shown.text not in RUN
    }.values()
)
FORMS = list({shown.text: shown for shown in SHOWN if shown.is_form}.values())


def test_every_command_of_the_pages_is_covered():
    known = {*RUN, *ELSEWHERE, *(shown.text for shown in [*LAUNCHES, *FORMS])}
    assert len(SHOWN) > 60
    missing = {f"{shown.page}: {shown.text}" for shown in SHOWN if shown.text not in known and not _of_docker(shown)}
    assert not missing, f"run these, or say which test does: {missing}"
    gone = {*RUN, *ELSEWHERE} - {shown.text for shown in SHOWN}
    assert not gone, f"no page shows these any more: {gone}"


def _of_docker(shown: Shown) -> bool:
    return shown.words[0] == "docker"  # tests/launch/test_container.py has them


@pytest.mark.parametrize("test", sorted(set(ELSEWHERE.values())))
def test_the_test_that_runs_it_exists(test):
    file, _, name = test.partition("::")
    assert f"def {name}" in (ROOT / file).read_text()


@pytest.mark.parametrize("shown", FORMS, ids=lambda shown: shown.text)
def test_forms_name_commands_and_options_that_exist(shown):
    words = [word for word in shown.words[1:] if word != "-m"]
    if shown.words[0] == "launch/torchrun.sh":
        words = list(shown.words[1:])
    if words == ["COMMAND", "--help"]:
        return
    text = " ".join(words)
    for form in re.split(r" \| ", text) if " | " in text else [text]:
        named = [c for c in COMMANDS if f"{form} ".startswith(f"{c.name} ") or c.name.split()[-1] == form.split()[0]]
        assert named, f"{shown.page}: {shown.text}"
        for option in re.findall(r"--([a-z-]+)(?=[= ]|$)", form):
            own = {name.replace("_", "-") for command in named for name in command.own.model_fields}
            assert option in {"help", *own} or f"--{option}" in named[0].usage, f"{shown.text}: --{option}"


# ---- run


@pytest.fixture(scope="module")
def folder(sft_run, tmp_path_factory):
    folder = tmp_path_factory.mktemp("reader")
    reader.lay_out(folder, sft_run)
    return folder


@pytest.fixture(scope="module")
def published(folder, tmp_path_factory):
    to = tmp_path_factory.mktemp("published")
    reader.cluster(folder, to)
    return to


def words_of(command: str, more: tuple[str, ...], folder: Path) -> tuple[str, ...]:
    """The arguments of `pctrain`, with the reader's files and fewer of everything."""
    text = command.replace("/models/", f"{folder}/models/").replace("/shared/", f"{folder}/shared/")
    for shown, small in CHANGED.items():
        text = text.replace(shown, small)
    words = shlex.split(text)
    return (*words[words.index("pctrain") + 1 :], *more)


def check(results, table):
    for command, (status, printed) in zip(table, results, strict=False):
        assert status == 0, f"{command}\n{printed[-3000:]}"
    assert len(results) == len(table)


@pytest.fixture(scope="module")
def sets(folder):
    """Return the output of the commands without a model; the sets that they made are in the folder."""
    rated = [
        {"prompt": f"{i}+1=", "response": f"\\boxed{{{i + 1}}}", "win_rate": i % 5 / 4, "attempts": 4}
        for i in range(60)
    ]
    reader.lines(folder / "rated.jsonl", rated)
    results = reader.run(folder, [words_of(command, more, folder) for command, more in WITHOUT_MODEL.items()])
    (folder / "rated.jsonl").unlink()  # `data winrate` makes the real one
    return results


def test_commands_on_sets_and_curves(folder, sets):
    check(sets, WITHOUT_MODEL)
    assert len((folder / "hard.jsonl").read_text().splitlines()) == 20
    assert json.loads((folder / "fits.json").read_text()) and (folder / "sets" / "validation.jsonl").exists()


@pytest.fixture(scope="module")
def runs(ranks, folder):
    """Return the output of the commands on models; their runs are in the folder."""
    commands = [words_of(command, more, folder) for command, more in WITH_MODEL.items()]
    return ranks.run(reader.run, folder, commands, world=1, deadline=500)[0]


@pytest.mark.timeout(600)
def test_commands_on_models(folder, runs):
    check(runs, WITH_MODEL)
    judged = [json.loads(line) for line in (folder / "runs/judged/metrics.jsonl").read_text().splitlines()]
    assert any("verdicts/right" in line or "verdicts/wrong" in line for line in judged)
    assert "my_algorithms.py" in (folder / "runs/rpp/config.yaml").read_text()  # among the fingerprints


@pytest.mark.full
@pytest.mark.timeout(1200)
def test_the_long_commands_on_models(ranks, folder, sets, runs):
    commands = [words_of(command, more, folder) for command, more in WITH_MODEL_LONG.items()]
    [results] = ranks.run(reader.run, folder, commands, world=1, deadline=1000)
    check(results, WITH_MODEL_LONG)


def test_plans(folder, published):
    check(
        reader.run(published, [words_of(command, more, published) for command, more in AT_PUBLISHED_SIZE.items()]),
        AT_PUBLISHED_SIZE,
    )
    assert (published / "plan.json").exists() and (published / "memory.png").exists()


@pytest.mark.full
@pytest.mark.timeout(600)
def test_the_command_on_two_ranks(ranks, folder):
    [(command, more)] = ON_TWO_RANKS.items()
    for results in ranks.run(reader.run, folder, [words_of(command, more, folder)], world=2, deadline=400):
        check(results, ON_TWO_RANKS)


@pytest.mark.full
def test_the_kernels_install_alone(tmp_path):
    source = shutil.copytree(ROOT / "kernels", tmp_path / "kernels")  # a build leaves folders in its source
    offline = ["--no-deps", "--no-index", "--no-build-isolation"]
    install = [sys.executable, "-m", "pip", "install", *offline, "--target", str(tmp_path / "there"), str(source)]
    done = subprocess.run(install, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    seen = subprocess.run(
        [sys.executable, "-c", "import pctrain_kernels; print(pctrain_kernels.__file__)"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path / "there")},
        timeout=200,
    )
    assert str(tmp_path / "there") in seen.stdout, seen.stderr


# ---- parsed and resolved

GPUS = 8  # of a node


@pytest.mark.parametrize("shown", LAUNCHES, ids=lambda shown: shown.text)
def test_what_is_started_on_nodes_resolves(shown, published, monkeypatch):
    arguments, nodes = _after_launcher(shown)
    assert arguments[0] in {command.name for command in COMMANDS}
    if arguments[0] == "doctor":
        return  # it takes no config; tests/tools/test_doctor.py has its options
    monkeypatch.chdir(published)
    monkeypatch.setenv("WORLD_SIZE", str(nodes * GPUS))
    sections = next(command for command in COMMANDS if command.name == arguments[0]).options
    keys = [argument for argument in arguments if re.match(r"--\w+\.\w", argument)]
    config_load.load(
        Path(arguments[arguments.index("--config") + 1]), keys, sections={s.split(".")[0] for s in sections}
    )


def _after_launcher(shown: Shown) -> tuple[list[str], int]:
    """Return (arguments of pctrain, nodes) of a torchrun.sh, sbatch ... slurm.sbatch or torchrun ... -m pctrain line."""
    words = list(shown.words)
    at = next(i for i, word in enumerate(words) if word.startswith("launch/") or word == "pctrain")
    given = dict(pair.removeprefix("--").split("=", 1) for pair in [*shown.environment, *words[1:at]] if "=" in pair)
    return words[at + 1 :], int(given.get("NNODES") or given.get("nodes") or 1)


@pytest.mark.parametrize(
    "shown", [s for s in LAUNCHES if s.words[0] == "launch/torchrun.sh"], ids=lambda shown: shown.text
)
def test_the_launcher_takes_them(shown, tmp_path):
    python = tmp_path / "bin" / "python"
    python.parent.mkdir()
    python.write_text('#!/bin/sh\necho "$@"\n')
    python.chmod(0o755)
    environment = dict(pair.split("=", 1) for pair in shown.environment) | {
        "PCTRAIN_VENV": str(tmp_path),
        "NPROC": str(GPUS),
    }
    done = subprocess.run(
        ["bash", *shown.words],
        cwd=ROOT,
        env={"PATH": os.environ["PATH"], **environment},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0 and done.stdout.endswith(f"-m pctrain {' '.join(shown.words[1:])}\n"), done.stderr
