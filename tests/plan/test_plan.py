"""`pctrain plan`: numbers counted by hand, rules that hold at every layout, and what the command says."""

import json
import os
import shlex
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pctrain.cli.main import main
from pctrain.config.check import check_combinations
from pctrain.config.load import load, read
from pctrain.config.tree import Config, ModelConfig, ParallelConfig, RLConfig
from pctrain.hf.config import HFConfig
from pctrain.plan.gpus import GIB, GPUS
from pctrain.plan.layouts import even_ends
from pctrain.plan.memory import in_flight
from pctrain.plan.options import PlanOptions
from pctrain.plan.page import nothing_fits
from pctrain.plan.planner import EQUAL, Planner
from pctrain.plan.rollouts import engine
from pctrain.plan.shapes import Layout, all_parameters
from pctrain.plan.speed import bubble_share
from pctrain.plan.work import passes
from tests.helpers.plan_models import LLAMA_3B, MODELS, QWEN_7B, write_config

LARGE = ["--model.dtype=bfloat16", "--sft.batch_size=512", "--sft.token_budget=8192"]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    return {name: write_config(folder / name, shape) for name, shape in MODELS.items()}


@pytest.fixture
def paper(tmp_path, monkeypatch):
    """The paper's configs with their models as directories of a config.json alone, in the current directory."""
    root = os.path.abspath(os.path.join(os.path.dirname(__file__), "..", "..", "configs", "retu"))
    monkeypatch.chdir(tmp_path)
    write_config(tmp_path / "models" / "Qwen2.5-7B", QWEN_7B)
    write_config(tmp_path / "models" / "Llama-3.2-3B", LLAMA_3B)
    return root


def _planner(options, gpus=8, gpu="h100", kind=None, pinned=(), **assumed):
    return Planner.of(read(None, options), PlanOptions(gpus=gpus, gpu=gpu, kind=kind, **assumed), pinned)


# ---- counted by hand
# -----------------------------------------------------------------------------------------------------------


def test_parameters_of_published_models(models):
    # As their model cards and transformers count them.
    counted = {name: all_parameters(HFConfig.read(path)) for name, path in models.items()}
    assert counted == {"qwen-7b": 7_615_616_512, "llama-3b": 3_212_749_824, "qwen-30b-a3b": 30_532_122_624}


def test_the_papers_rl_on_eight_gpus_of_80_gb(paper):
    config = read(Path(f"{paper}/rl-pipeline.yaml"), ["--parallel.tensor=2", "--parallel.recompute=selective"])
    planner = Planner.of(config, PlanOptions(gpus=8, gpu="h100"), ())
    assert planner.kind == "rl" and planner.work.rounds == 1 and planner.work.sequences == 64 * 8
    plan = planner.as_configured()
    moment = plan.memory.of("update").parts
    # Two tensor parallel ranks; norms (57 of 3584) are whole on both, biases (28 of 4608) cut.
    one = (7_615_616_512 - 57 * 3584) // 2 + 57 * 3584
    assert moment["weights"] == pytest.approx(2 * one, rel=1e-5) and moment["gradients"] == pytest.approx(
        4 * one, rel=1e-5
    )
    assert moment["optimizer"] == pytest.approx(
        12 * one / 4, rel=1e-5
    )  # master, two moments, over four data parallel ranks
    # 16384 tokens in bfloat16, recompute selective, sequence parallel: of each of 28 layers, elements a token: the
    # stream four times, cut; queries, keys, values (28 + 2 x 4 heads of 128), rotated queries and keys, and the output;
    # three times the feed-forward width. In float32, two scales of norms, cut.
    layer = 4 * 3584 / 2 + (36 + 32 + 28) * 128 / 2 + 3 * 18944 / 2
    assert moment["activations"] == pytest.approx(28 * (layer * 2 + 2 * 4 / 2) * 16384, rel=1e-6)
    assert plan.memory.of("rollout").parts["engine"] == pytest.approx(0.6 * 79.1 * GIB)
    assert (
        plan.engine.token_bytes == 2 * 28 * 2 * 128 * 2
    )  # keys and values, layers, heads of one of two ranks, bfloat16
    assert (
        not plan.fits and planner.plans()[0].fits
    )  # packs of 16384 tokens do not fit so; another layout of the same GPUs does


def test_a_reference_and_float32(models):
    options = [
        f"--model.path={models['llama-3b']}",
        "--rl.algorithm.kl_coef=0.01",
        "--rl.token_budget=4096",
        "--rollout.max_response=512",
    ]
    parts = _planner(options, gpus=1, gpu="h200", kind="rl").as_configured().memory.of("update").parts
    count = 3_212_749_824
    assert parts["reference"] == 4 * count
    assert parts["weights"] == pytest.approx(4 * count, rel=1e-5) and parts["optimizer"] == pytest.approx(
        8 * count, rel=1e-5
    )  # no master
    offloaded = _planner([*options, "--rl.reference_offload=true"], gpus=1, gpu="h200", kind="rl").as_configured()
    assert (
        "reference" not in offloaded.memory.of("update").parts
        and offloaded.memory.of("reference").parts["reference"] == 4 * count
    )


@pytest.mark.parametrize(
    ("pipeline", "virtual", "stage", "micro_batches", "held"),
    [
        (1, 1, 0, 8, 1),
        (4, 1, 0, 8, 4),
        (4, 1, 0, 2, 2),
        (4, 1, 1, 8, 3),
        (4, 1, 3, 8, 1),
        (4, 2, 0, 8, (2 * 3 + 4 + 1) / 2),
        (4, 2, 3, 8, (4 + 1) / 2),
        (2, 2, 0, 2, 2 * 2 / 2),
    ],
)
def test_micro_batches_in_flight(pipeline, virtual, stage, micro_batches, held):
    layout = Layout(ParallelConfig(pipeline=pipeline, virtual_pipeline=virtual), pipeline)
    assert in_flight(layout, stage, micro_batches) == held


def test_the_bubble():
    assert bubble_share(Layout(ParallelConfig(pipeline=8), 8), 24) == pytest.approx(7 / 31)
    assert bubble_share(Layout(ParallelConfig(pipeline=8, virtual_pipeline=2), 8), 24) == pytest.approx(7 / 55)


def test_bytes_on_the_interconnect(models):
    options = [
        f"--model.path={models['qwen-7b']}",
        *LARGE,
        "--parallel.tensor=2",
        "--parallel.sequence_parallel=true",
        "--parallel.pipeline=2",
    ]
    speed = _planner(options, gpus=16, prompt=1024, response=1024).as_configured().speed
    sent = {one.group: one for one in speed.traffic}
    tokens = 512 * 2048 / 4  # of one of four data parallel ranks
    # Two blocks a layer, gathered and scattered forwards and backwards, and the inputs gathered once more: 10; 4 at the
    # ends; half each.
    assert sent["tensor"].sent == pytest.approx((14 * 10 + 4) * tokens * 3584 * 2 / 2)
    assert sent["pipeline"].sent == pytest.approx(
        2 * tokens * 3584 * 2 / 2
    )  # there and back, cut over the tensor parallel ranks
    assert sent["data"].sent == pytest.approx(
        3 / 4 * (4 + 2) * 7.6156e9 / 4, rel=0.1
    )  # fp32 there, bfloat16 back, three quarters
    assert (sent["tensor"].wire, sent["pipeline"].wire, sent["data"].wire) == (
        "within a node",
        "between nodes",
        "within a node",
    )


def test_time_is_flops_over_rate(models):
    planner = _planner([f"--model.path={models['llama-3b']}", *LARGE], gpus=8, prompt=1024, response=1024, mfu=0.4)
    parts = planner.as_configured().speed.parts
    # Matrices of the layers and the head; causal attention of 2048 tokens.
    weights = 28 * (2 * 3072 * 3072 + 2 * 3072 * 1024 + 3 * 3072 * 8192) + 128256 * 3072
    tokens = 512 * 2048
    flops = 6 * weights * tokens + 6 * 28 * 3072 * 2049 * tokens
    assert parts["compute"] == pytest.approx(flops / 8 / (0.4 * 989e12), rel=1e-3) and parts["bubble"] == 0


def test_the_engines_cache(models):
    config = Config(model=ModelConfig(path=models["qwen-7b"], dtype="bfloat16"))
    of_one = engine(HFConfig.read(models["qwen-7b"]), config, GPUS["h100"])
    assert of_one.token_bytes == 57_344 and of_one.awake == pytest.approx(0.4 * 79.1 * GIB)
    left = of_one.awake - 2 * 7_615_616_512 - of_one.cache  # vLLM's largest pass, of 16384 tokens, and captured graphs
    assert left == pytest.approx(16384 * 2 * (3 * 18944 + 4 * 3584) + 1.5 * GIB)
    assert of_one.idle == pytest.approx(of_one.awake - 16384 * 2 * (3 * 18944 + 4 * 3584))
    assert of_one.sequences(8448) == int(of_one.cache / 57_344) // 8448


@pytest.mark.parametrize(
    ("layers", "pipeline", "ends"),
    [(28, 4, (None, None)), (28, 8, (2, 2)), (61, 16, (3, 2)), (48, 5, (9, 9)), (3, 2, (2, 1))],
)
def test_uneven_ends(layers, pipeline, ends):
    assert even_ends(layers, pipeline) == ends


def test_passes_are_those_of_the_algorithms():
    from pctrain.rl.algorithms import registry as algorithms

    for name, kind in algorithms.ALGORITHMS.items():
        for updates, extra in (
            (1, {}),
            (2, {}),
            (1, {"kl_coef": 0.1}),
            (1, {"kl_coef": 0.1, "kl_kind": "k1"}),
            (1, {"is_correction": "sequence"}),
        ):
            if not extra.keys() <= kind.Options.option_fields().keys():
                continue  # srft has no KL
            rl = RLConfig(algorithm={"name": name, **extra}, updates=updates)
            streams = algorithms.build(rl, 48).streams_from_pass
            own = ("logprob",) if streams & {"old_logprob", "entropy"} else ()
            assert passes(rl) == own + (("reference",) if "ref_logprob" in streams else ()), (name, extra)


# ---- at every layout
# -----------------------------------------------------------------------------------------------------------


@settings(max_examples=8)
@given(
    name=st.sampled_from(sorted(MODELS)),
    gpus=st.sampled_from([1, 6, 8, 24, 64, 128]),
    gpu=st.sampled_from(sorted(GPUS)),
    batch=st.sampled_from([96, 512]),
)
def test_what_is_listed_passes_the_checks(models, name, gpus, gpu, batch):
    planner = _planner([f"--model.path={models[name]}", *LARGE, f"--sft.batch_size={batch}"], gpus, gpu)
    plans = planner.plans()
    assert len({(plan.name, plan.layout.parallel.recompute) for plan in plans}) == len(plans)
    for plan in plans:
        check_combinations(plan.config, gpus, ("model", "parallel", "rollout", "sft"))
        par = plan.layout.parallel
        assert par.tensor * par.pipeline * par.context * plan.layout.data == gpus
        assert sum(plan.layout.stage_layers(planner.hf.layers)) == planner.hf.layers
        assert all(seconds >= 0 for seconds in plan.speed.parts.values()) and 0 <= plan.speed.bubble < 1
    fitting = [plan.fits for plan in plans]
    assert fitting == sorted(fitting, reverse=True)
    seconds = [plan.speed.seconds for plan in plans if plan.fits]
    assert all(
        one <= other * EQUAL for one, other in pairwise(seconds)
    )  # the fastest first, but for what counts as equal


@settings(max_examples=20)
@given(
    name=st.sampled_from(sorted(MODELS)),
    tensor=st.sampled_from([1, 2, 4]),
    pipeline=st.sampled_from([1, 2, 4]),
    data=st.sampled_from([1, 2, 4, 16]),
    recompute=st.sampled_from(["none", "selective", "full"]),
)
def test_more_data_parallel_ranks_never_need_more(models, name, tensor, pipeline, data, recompute):
    options = [
        f"--model.path={models[name]}",
        *LARGE,
        f"--parallel.tensor={tensor}",
        f"--parallel.pipeline={pipeline}",
        f"--parallel.recompute={recompute}",
        f"--parallel.sequence_parallel={str(tensor > 1).lower()}",
    ]
    few, more = (_planner(options, tensor * pipeline * n, "h200").as_configured().memory for n in (data, 2 * data))
    padding = 12 * 64 * 1024
    for phase in few.phases:
        assert more.of(phase).total <= few.of(phase).total + padding, phase


@settings(max_examples=10)
@given(
    name=st.sampled_from(sorted(MODELS)),
    tensor=st.sampled_from([1, 2, 4]),
    spec=st.sampled_from(["te", "torch-varlen", "torch"]),
)
def test_recomputation_saves_memory_and_costs_flops(models, name, tensor, spec):
    found = []
    for recompute in ("none", "selective", "full"):
        options = [
            f"--model.path={models[name]}",
            *LARGE,
            f"--parallel.tensor={tensor}",
            f"--parallel.recompute={recompute}",
            f"--parallel.sequence_parallel={str(tensor > 1).lower()}",
            f"--model.spec={spec}",
        ]
        plan = _planner(options, 8, "h200").as_configured()
        found.append((plan.memory.of("update").parts["activations"], plan.speed.flops))
    (none, *_), (selective, *_), (full, *_) = found
    # Flash attention keeps nothing that recomputing it would save: its inputs keep as much.
    assert selective > full and none > full and (spec != "torch" or none > selective)
    assert found[0][1] < found[1][1] < found[2][1]


# ---- the command
# ---------------------------------------------------------------------------------------------------------------


def test_it_plans_the_papers_run_without_torch(paper, tmp_path):
    command = ["plan", "--config", f"{paper}/rl-pipeline.yaml", "--gpus", "8", "--gpu", "h100", "--out", "plan.json"]
    program = (
        f"import sys; from pctrain.cli.main import main; status = main({command!r}); "
        "assert 'torch' not in sys.modules; sys.exit(status)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    assert "TP4 DP2 (as configured)" in done.stdout and "Start it:" in done.stdout and "(--mfu)" in done.stdout
    plan = json.loads((tmp_path / "plan.json").read_text())
    best = plan["layouts"][0]
    fullest = max(sum(parts.values()) for parts in best["memory"].values())
    assert best["fits"] and fullest == pytest.approx(best["share"] * plan["gpu"]["memory"])
    # The line that it prints is one that the trainer takes, on so many ranks.
    words = shlex.split(plan["launch"])
    assert words[:3] == ["NPROC=8", "launch/torchrun.sh", "rl"]
    os.environ["WORLD_SIZE"] = "8"
    try:
        config = load(Path(words[4]), words[5:], sections=("model", "parallel", "rollout", "rl"))
    finally:
        del os.environ["WORLD_SIZE"]
    assert (
        config.parallel.model_dump(mode="json") == best["parallel"] and config.rollout.tensor == best["rollout_tensor"]
    )


def test_several_nodes_and_a_key_that_is_given(models, capsys):
    assert (
        main(
            [
                "plan",
                "--gpus=64",
                "--gpu=h200",
                f"--model.path={models['qwen-7b']}",
                *LARGE,
                "--parallel.tensor=4",
                "--top=3",
            ]
        )
        == 0
    )
    printed = capsys.readouterr().out
    rows = [line for line in printed.splitlines() if " DP" in line and "%" in line]
    assert len(rows) >= 3 and all("TP4" in row for row in rows[:3])
    assert (
        "NPROC=8 NNODES=8 RDZV=FIRST_NODE:29500 launch/torchrun.sh sft" in printed
        and "--parallel.tensor=4" in printed.splitlines()[-1]
    )


def test_where_nothing_fits_it_says_by_how_much_and_what_would_help(models, capsys):
    assert main(["plan", "--gpus=8", "--gpu=a100-40", f"--model.path={models['qwen-30b-a3b']}", *LARGE]) == 0
    printed = capsys.readouterr().out
    assert "No layout fits: the smallest" in printed and "GiB over the 39.4 GiB of a GPU" in printed
    assert "more GPUs: 16" in printed and "Start it" not in printed


def test_it_warns_of_rollouts_that_do_not_fit(models, capsys):
    options = [
        "--model.dtype=bfloat16",
        "--rl.token_budget=32768",
        "--rollout.max_response=30000",
        "--rollout.max_sequences=512",
        "--rl.prompts=512",
        "--rl.round_prompts=1024",
        "--rollout.gpu_memory=0.3",
    ]
    assert main(["plan", "--gpus=8", "--gpu=h200", "--kind=rl", f"--model.path={models['llama-3b']}", *options]) == 0
    printed = capsys.readouterr().out
    assert "rollouts will not all fit" in printed and "set rollout.max_sequences to" in printed


def test_an_engine_without_room_for_one_sequence(models):
    options = [
        f"--model.path={models['qwen-7b']}",
        "--model.dtype=bfloat16",
        "--rollout.max_response=512",
        "--rl.token_budget=4096",
        "--rollout.gpu_memory=0.14",
    ]
    plan = _planner(options, 8, "h200", "rl").as_configured()
    assert plan.share < 1 and plan.engine.tokens < 131072 and not plan.fits  # vLLM would refuse to start
    assert (
        "vLLM wants room for one sequence of the whole context (less with rollout.max_prompt), 131072 tokens"
        in nothing_fits(plan)
    )
    assert _planner([*options, "--rollout.max_prompt=1024"], 8, "h200", "rl").as_configured().fits  # 1536 tokens


def test_a_figure_and_a_model_from_scratch(tmp_path, capsys):
    quickstart = os.path.join(os.path.dirname(__file__), "..", "..", "configs", "quickstart.yaml")
    figure = tmp_path / "memory.png"
    assert main(["plan", "--config", quickstart, "--gpus=4", "--gpu=a100-80", "--kind=rl", f"--figure={figure}"]) == 0
    assert figure.read_bytes()[:4] == b"\x89PNG" and "LlamaForCausalLM" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("typed", "words"),
    [
        (["--gpus=8", "--gpu=h900"], ["this kind of GPU is not known", "h200, h100, a100-80, a100-40, b200"]),
        (["--gpus=0", "--gpu=h100"], ["--gpus: expected greater than or equal to 1", "'0'"]),
        (["--gpu=h100"], ["needs --gpus"]),
        (["--gpus=8", "--gpu=h100", "foo"], ["unexpected argument 'foo'"]),
        (["--gpus=8", "--gpu=h100", "--model.path=nowhere"], ["nowhere/config.json: not found"]),
        (
            ["--gpus=8", "--gpu=h100", "--parallel.tensor=3"],
            [
                "no layout of 8 GPUs passes the checks with parallel.tensor as given",
                "parallel.tensor = 3 does not divide the attention heads",
                "parallel.tensor: 1, 2, 4",
            ],
        ),
        (
            ["--gpus=7", "--gpu=h100", "--sft.batch_size=32", "--parallel.pipeline=1"],
            [
                "sft.batch_size = 32 is not divisible by the data parallel size 7",
                "data parallel size: 1 (sft.batch_size = 32)",
            ],
        ),
        (["--gpus=8", "--gpu=h100", "--model.fp8=blockwise"], ["model.fp8 = blockwise needs model.dtype = bfloat16"]),
    ],
)
def test_bad_input_is_one_clear_error(typed, words, capsys):
    assert main(["plan", *typed]) == 2
    error = capsys.readouterr().err
    assert error.count("error: ") == 1 and "Traceback" not in error
    for word in words:
        assert word in error


def test_a_layout_of_the_file_that_does_not_run_is_reported_and_skipped(models, tmp_path, capsys):
    (tmp_path / "c.yaml").write_text(
        f"model: {{path: {models['qwen-7b']}, dtype: bfloat16}}\nparallel: {{tensor: 2, pipeline: 4}}\n"
        "sft: {batch_size: 60, token_budget: 4096}\n"
    )
    assert main(["plan", "--config", str(tmp_path / "c.yaml"), "--gpus=12", "--gpu=h200"]) == 0
    printed = capsys.readouterr().out
    assert (
        "The config's own layout does not run on 12 GPUs" in printed
        and "8 does not divide the world size 12" in printed
    )
    assert "Start it" in printed
