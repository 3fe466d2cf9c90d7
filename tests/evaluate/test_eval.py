r"""`pctrain eval` with a real engine: samples, verdicts, scores, and the same files if it is stopped half-way."""

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
import yaml

from pctrain.reward.verifiers import VERIFIERS
from pctrain.rollout import sampling_seed
from tests.helpers import sets_cli as cli
from tests.helpers import tiny

ROOT = Path(__file__).resolve().parents[2]
PROMPTS = [f"{i}+{i + 1}=" for i in range(30)]
ENGINE = {"kv_cache_mb": 64, "max_sequences": 8}  # 32 samples a batch
JUDGE = """
def judge(response, answer, prompt):
    if prompt.startswith("0+"):
        raise ValueError("no zero")
    return "1" in response and prompt.endswith("=")
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with three benchmarks and a config that names them.

    `percent`: only the lenient verifier reads 1 as 100%.
    """
    tmp_path = tmp_path_factory.mktemp("place")
    cli.write(tmp_path / "gsm8k.jsonl", [{"question": p, "answer": "It is\n#### 1"} for p in PROMPTS[:20]])
    cli.write(tmp_path / "math.jsonl", [{"problem": p, "solution": r"\boxed{2}"} for p in PROMPTS[:6]])
    cli.write(tmp_path / "percent.jsonl", [{"problem": p, "answer": r"100\%"} for p in PROMPTS[:8]])
    (tmp_path / "my_judge.py").write_text(JUDGE)
    benchmarks = {"gsm8k": "gsm8k.jsonl", "math": {"path": "math.jsonl", "samples": 2}, "percent": "percent.jsonl"}
    settings = {"eval": {"samples": 4, "benchmarks": benchmarks}, "rollout": ENGINE}
    (tmp_path / "bench.yaml").write_text(yaml.safe_dump(settings))
    return tmp_path


def evaluate(folder, *arguments):
    """Return (status, errors, the completions of each batch, engines started); runs in this process."""
    from pctrain.rollout import RolloutEngine

    generate, start, calls, engines = RolloutEngine.generate_batches, RolloutEngine.__init__, [], []

    def counted(self, batches, **options):
        for completions in generate(self, batches, **options):
            if os.environ.get("STOP_AFTER") == str(len(calls)):
                raise KeyboardInterrupt
            calls.append(len(completions))
            yield completions

    def started(self, *args, **options):
        engines.append(1)
        start(self, *args, **options)

    RolloutEngine.generate_batches, RolloutEngine.__init__ = counted, started
    before = os.getcwd()
    os.chdir(folder)
    try:
        status, errors = tiny.cli("eval", *map(str, arguments))
    finally:
        os.chdir(before)
        RolloutEngine.generate_batches, RolloutEngine.__init__ = generate, start
    return status, errors, calls, len(engines)


def stopped(folder, after, *arguments):
    os.environ["STOP_AFTER"] = str(after)
    try:
        return evaluate(folder, *arguments)
    finally:
        del os.environ["STOP_AFTER"]


def contents(out):
    files = [path for path in sorted(out.rglob("*")) if path.is_file() and path.name != ".eval.lock"]
    return {str(path.relative_to(out)): path.read_bytes() for path in files}


COMMON = ["--config", "bench.yaml", "--eval.judge=my_judge:judge"]
NAMES = ["run-step-50", "run-step-25", "run"]


@pytest.fixture(scope="module")
def models(two_answers):
    return [two_answers / "checkpoints" / "step-50", two_answers / "checkpoints" / "step-25", two_answers]


@pytest.fixture(scope="module")
def out(ranks, models, place):
    """The folder of an uninterrupted call."""
    [(status, errors, calls, engines)] = ranks.run(
        evaluate, place, *models, "--out", "out", *COMMON, world=1, deadline=280
    )
    assert status == 0, errors
    assert engines == 1 and sum(calls) == 3 * (80 + 12 + 32)
    return place / "out"


@pytest.mark.timeout(400)
def test_every_sample_is_kept_with_verdicts_that_anybody_can_reproduce(out):
    for name in NAMES:
        samples = cli.read(out / name / "gsm8k" / "samples.jsonl")
        assert [(line["index"], line["sample"], line["prompt"]) for line in samples] == [
            (i, k, PROMPTS[i]) for i in range(20) for k in range(4)
        ]
        assert [line["seed"] for line in samples] == [
            sampling_seed(0, "eval", 0, i, k) for i in range(20) for k in range(4)
        ]
        for line in samples:
            assert line["strict"]["cause"] == VERIFIERS["strict"](line["response"], "1").cause and line["answer"] == "1"
            assert line["lenient"]["reward"] == VERIFIERS["lenient"](line["response"], "1").reward
    samples = {name: (out / name / "gsm8k" / "samples.jsonl").read_bytes() for name in NAMES}
    assert (
        samples["run-step-50"] == samples["run"] != samples["run-step-25"]
    )  # a checkpoint, and what was exported from it


def test_the_figures_are_those_of_the_samples(out):
    results = json.loads((out / "results.json").read_text())
    assert [model["name"] for model in results["models"]] == NAMES
    for model in results["models"]:
        for benchmark, k in (("gsm8k", 4), ("math", 2), ("percent", 4)):
            lines = cli.read(out / model["name"] / benchmark / "samples.jsonl")
            right = np.array([line["strict"]["reward"] for line in lines]).reshape(-1, k)
            entry = model["benchmarks"][benchmark]
            assert entry["strict"]["score"] == pytest.approx(100 * right.mean())
            assert entry["pass_at"]["2"]["score"] == pytest.approx(
                100 * np.mean([[max(row[i], row[j]) for i, j in combinations(range(k), 2)] for row in right])
            )
        weighted = (
            sum(n * model["benchmarks"][b]["strict"]["score"] for b, n in (("gsm8k", 20), ("math", 6), ("percent", 8)))
            / 34
        )
        assert model["weighted"]["strict"]["score"] == pytest.approx(weighted)
        assert model["mean"]["strict"]["score"] == pytest.approx(
            np.mean([model["benchmarks"][b]["strict"]["score"] for b in ("gsm8k", "math", "percent")])
        )
    later, same = results["differences"]
    assert (later["model"], same["model"], same["against"]) == ("run-step-25", "run", "run-step-50")
    scores = [model["benchmarks"]["gsm8k"]["strict"]["score"] for model in results["models"]]
    assert (
        later["gsm8k"]["score"] == pytest.approx(scores[1] - scores[0])
        and same["weighted"]["score"] == 0 < same["weighted"]["high"]
    )
    rows = list(csv.DictReader((out / "results.csv").open()))
    assert len(rows) == 3 * 5 and float(rows[0]["strict"]) == scores[0] and rows[3]["benchmark"] == "benchmark mean"
    assert (out / "scores.png").read_bytes().startswith(b"\x89PNG") and not (out / "curves.json").exists()


def test_disagreements_are_listed_and_judged_unless_the_judge_raised(out):
    results = json.loads((out / "results.json").read_text())
    lines, disputed = (cli.read(out / "run" / "percent" / f"{name}.jsonl") for name in ("samples", "disagreements"))
    ones = [line for line in lines if line["response"] == r"\boxed{1}"]
    assert [(d["index"], d["sample"]) for d in disputed] == [
        (line["index"], line["sample"]) for line in ones
    ] and 5 < len(ones) < 32
    entry = results["models"][2]["benchmarks"]["percent"]
    raised = sum(d["index"] == 0 for d in disputed)
    assert all((d["judged"]["cause"] == "error") == (d["index"] == 0) for d in disputed) and 0 < raised < len(ones)
    assert (entry["disagreements"], entry["judge_faults"]) == (len(ones), raised)
    assert [entry[v]["score"] for v in ("strict", "lenient", "judged")] == pytest.approx(
        [0, 100 * len(ones) / 32, 100 * (len(ones) - raised) / 32]
    )


@pytest.mark.timeout(400)
def test_a_call_that_was_stopped_resumes_to_the_same_files(ranks, models, place, out):
    """In the second model, with half a line on the disk."""
    again = [*models, "--out", "again", *COMMON]
    [(status, _, calls, _)] = ranks.run(stopped, place, 6, *again, world=1, deadline=240)
    assert status == 130 and len(calls) == 6 and not (place / "again" / "results.json").exists()
    partial = place / "again" / "run-step-25" / "gsm8k" / "samples.jsonl.partial"
    kept = partial.read_bytes().count(b"\n")
    assert 0 < kept < 80
    with open(partial, "ab") as stream:
        stream.write(b'{"id": "gsm8k.jso')
    [(status, errors, calls, _)] = ranks.run(evaluate, place, *again, world=1, deadline=240)
    assert status == 0 and sum(calls) == 2 * 124 - kept, errors
    assert contents(place / "again") == contents(out)


def test_finished_samples_are_not_drawn_again_and_other_settings_are_refused(ranks, models, place, out):
    before = contents(out)
    [(status, _, calls, engines)] = ranks.run(evaluate, place, *models, "--out", "out", *COMMON, world=1, deadline=240)
    assert (status, calls, engines) == (0, [], 0) and contents(out) == before
    [(status, errors, *_)] = ranks.run(
        evaluate, place, models[0], "--out", "out", *COMMON, "--eval.temperature=0.5", world=1
    )
    assert (
        status == 2
        and "run-step-50/gsm8k holds the samples of a call with other temperature (0.7 there, 0.5 now)" in errors
    )


# ---- what cannot be evaluated ------------------------------------------------------------------------------------


def refused(ranks, place, *arguments):
    [(status, errors, _, engines)] = ranks.run(evaluate, place, *arguments, world=1)
    assert status == 2 and engines == 0, errors
    return errors


def test_what_cannot_be_evaluated_is_refused_before_an_engine_starts(ranks, two_answers, hf_dirs, place):
    there, common = ["--out", "refused"], ["--config", "bench.yaml"]

    def message(*arguments):
        return refused(ranks, place, two_answers, *there, *arguments)

    assert "pctrain eval needs eval.benchmarks" in message()
    assert "data file none.jsonl does not exist" in message("--eval.benchmarks={a: none.jsonl}")
    (place / "empty.jsonl").write_text("")
    assert "eval.benchmarks.a has no record" in message("--eval.benchmarks={a: empty.jsonl}")
    cli.write(place / "long.jsonl", [{"prompt": "1+" * 60 + "1=", "answer": 1}])
    assert "long.jsonl:1: the problem has" in message("--eval.benchmarks={a: long.jsonl}")
    assert "no room for an answer in the model's context of 64; remove it" in message(
        "--eval.benchmarks={a: long.jsonl}"
    )
    other = hf_dirs[True]
    errors = message(other, *common)
    assert f"{two_answers} and {other} are of two architectures (" in errors and "context 64 and 256" in errors
    shutil.copytree(two_answers / "hf", place / "bare", ignore=shutil.ignore_patterns("tokenizer*"))
    assert "bare/tokenizer.json does not exist" in refused(ranks, place, "bare", *there, *common)
    assert "pctrain eval takes checkpoints as operands" in message(
        *common, f"--model.checkpoint={two_answers}/checkpoints/step-25"
    )
    assert not (place / "refused").exists()
    assert "holds something else than results of pctrain eval" in refused(
        ranks, place, two_answers, "--out", two_answers, *common
    )
    assert "eval.judge = 'my_judge:nobody': " in message(*common, "--eval.judge=my_judge:nobody")
    assert "has no nobody; its functions: judge" in message(*common, "--eval.judge=my_judge:nobody")


# ---- against plain vLLM, on two ranks, killed --------------------------------------------------------------------


@pytest.mark.full
@pytest.mark.timeout(300)
def test_a_plain_vllm_script_has_the_same_answers_and_the_same_accuracy(two_answers, place, out):
    """The other side of benchmarks/eval_vllm.py."""
    problems = cli.write(place / "test.jsonl", [{"prompt": p, "answer": 1} for p in PROMPTS[:20]])
    script = [
        sys.executable,
        ROOT / "benchmarks" / "eval_vllm.py",
        "--samples=4",
        "--plain",
        two_answers / "hf",
        problems,
    ]
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}:{os.environ.get('PYTHONPATH', '')}"}
    subprocess.run([*script, place / "plain.jsonl"], env=environment, check=True, capture_output=True, timeout=250)
    ours, theirs = cli.read(out / "run" / "gsm8k" / "samples.jsonl"), cli.read(place / "plain.jsonl")
    assert [(a["seed"], a["tokens"], a["response"]) for a in ours] == [
        (b["seed"], b["tokens"], b["response"]) for b in theirs
    ]
    assert [a["strict"]["reward"] for a in ours] == [b["right"] for b in theirs] and 0 < sum(
        b["right"] for b in theirs
    ) < 80


@pytest.mark.full
@pytest.mark.timeout(300)
def test_hugging_face_directories_on_two_ranks(two_answers, place, out):
    """Without megatron-core, whose groups only checkpoints need."""
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}:{os.environ.get('PYTHONPATH', '')}"}
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command = [*torchrun, "-m", "pctrain", "eval", two_answers, "--out", "hf-alone", *COMMON]
    subprocess.run(command, env=environment, cwd=place, check=True, stdout=subprocess.DEVNULL, timeout=240)
    assert contents(place / "hf-alone" / "run") == contents(out / "run")


@pytest.mark.full
@pytest.mark.timeout(900)
def test_two_ranks_and_a_killed_process_leave_the_same_files(ranks, models, place, out):
    for status, errors, *_ in ranks.run(evaluate, place, *models, "--out", "shared", *COMMON, world=2, deadline=300):
        assert status == 0, errors
    assert contents(place / "shared") == contents(out)

    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}:{os.environ.get('PYTHONPATH', '')}"}
    command = [sys.executable, "-m", "pctrain", "eval", *map(str, models), "--out", "killed", *COMMON]
    process = subprocess.Popen(command, env=environment, cwd=place, stdout=subprocess.DEVNULL)
    partial = place / "killed" / "run-step-25" / "gsm8k" / "samples.jsonl.partial"
    while process.poll() is None and not (partial.exists() and partial.stat().st_size):
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL and not (place / "killed" / "results.json").exists()
    subprocess.run(command, env=environment, cwd=place, check=True, stdout=subprocess.DEVNULL, timeout=240)
    assert contents(place / "killed") == contents(out)
