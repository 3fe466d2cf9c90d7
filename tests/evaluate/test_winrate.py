r"""`pctrain data winrate` with a real engine: rates, and the same files if the process is stopped half-way."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.helpers import sets_cli as cli
from tests.helpers import tiny

ROOT = Path(__file__).resolve().parents[2]
PROMPTS = [f"{i}+{i + 1}=" for i in range(30)]
ENGINE = [
    "--rollout.max_response=12",
    "--rollout.kv_cache_mb=64",
    "--rollout.max_sequences=8",
]  # 8 records of 4 attempts a batch


@pytest.fixture(scope="module")
def model(two_answers):
    """A Hugging Face directory."""
    return two_answers / "hf"


@pytest.fixture(scope="module")
def records(tmp_path_factory):
    """33 records: 30 to rate, a third by their trajectory's box; one unanswered, one too long, one malformed."""
    values = [
        {"prompt": p, "answer": 1, "n": i} if i % 3 else {"prompt": p, "response": r"\boxed{3} no, \boxed{1}", "n": i}
        for i, p in enumerate(PROMPTS)
    ]
    path = cli.write(
        tmp_path_factory.mktemp("records") / "all.jsonl",
        [*values, {"prompt": "1=", "response": "no box"}, {"prompt": "1+" * 60 + "1=", "answer": 1}],
    )
    with open(path, "a") as stream:
        stream.write("{\n")
    return path


def winrate(records, out, model, *options):
    return ["winrate", str(records), f"--out={out}", f"--model.path={model}", *ENGINE, *options]


def stopped_after(batches: int, arguments: list[str]) -> int:
    """Run the command in this process until the engine has one more batch; return the number of rated records."""
    from pctrain.rollout import RolloutEngine

    generate, calls = RolloutEngine.generate_batches, []

    def failing(self, coming, **options):
        for completions in generate(self, coming, **options):
            if len(calls) == batches:
                raise KeyboardInterrupt
            calls.append(len(completions))
            yield completions

    RolloutEngine.generate_batches = failing
    try:
        tiny.cli("data", *arguments)
    finally:
        RolloutEngine.generate_batches = generate
    return sum(calls) // 4


@pytest.fixture(scope="module")
def rated(ranks, model, records, tmp_path_factory):
    """The output of an uninterrupted call."""
    out = tmp_path_factory.mktemp("rated") / "rated.jsonl"
    [(status, errors)] = ranks.run(tiny.cli, "data", *winrate(records, out, model), world=1, deadline=120)
    assert status == 0, errors
    return out


def test_every_record_has_its_rate(records, model, rated):
    rows = cli.read(rated)
    assert [{k: r[k] for k in r if k not in ("win_rate", "attempts", "win_rate_model")} for r in rows] == [
        json.loads(line) for line in records.read_text().splitlines()[:-1]
    ]
    assert {r["win_rate_model"] for r in rows} == {str(model)}
    rates = [r["win_rate"] for r in rows[:30]]
    assert all(r["attempts"] == 4 and r["win_rate"] in (0, 0.25, 0.5, 0.75, 1) for r in rows[:30])
    assert 0.2 < sum(rates) / 30 < 0.9 and len(set(rates)) > 2
    assert [(r["win_rate"], r["attempts"]) for r in rows[30:]] == [(None, 0), (None, 0)]


def test_the_manifest_counts_the_records(rated):
    manifest = cli.manifest(rated)
    assert manifest["answers"] == {"own": 21, "boxed": 10, "none": 1} and manifest["prompts_too_long"] == 1
    assert manifest["records"] == {"read": 33, "kept": 32, "dropped": {"unusable: malformed_json": 1}}
    assert sum(manifest["win_rates"].values()) == 30 and len(manifest["model"]["model.safetensors"]) == 64


def test_a_call_that_was_stopped_resumes_to_the_same_rates(ranks, model, records, rated, tmp_path):
    """It is stopped after two of four batches, in the middle of writing the second; only the rest is sampled again."""
    again = tmp_path / "again.jsonl"
    [done] = ranks.run(stopped_after, 2, winrate(records, again, model), world=1, deadline=120)
    progress = tmp_path / "again.jsonl.partial" / "progress.jsonl"
    assert done == 16 and not again.exists() and len(cli.read(progress)) == 17
    lines = progress.read_text().splitlines(keepends=True)
    progress.write_text("".join(lines[:14]) + '{"place": 13, "win_')
    assert "unfinished `pctrain data winrate`" in cli.refused("select", records, f"--out={again}", "--size=3")
    message = "other attempts (4 there, 2 now)"
    [(status, errors)] = ranks.run(
        tiny.cli, "data", *winrate(records, again, model, "--attempts=2"), world=1, deadline=120
    )
    assert status == 2 and message in errors
    [rest] = ranks.run(stopped_after, 99, winrate(records, again, model), world=1, deadline=120)
    assert rest == 17
    assert again.read_bytes() == rated.read_bytes() and not progress.parent.exists()


@pytest.mark.parametrize(
    "values, options, message",
    [
        ([{"prompt": "p", "response": "r"}], [], "no record has an answer to judge by"),
        ([{"prompt": "p", "answer": 1, "win_rate": 0.5}], [], "a column 'win_rate' already"),
        ([{"prompt": "p", "answer": 1}], ["--model.checkpoint=step-1"], "pctrain convert mcore-to-hf"),
    ],
)
def test_what_cannot_be_rated_is_refused_before_an_engine_starts(ranks, model, tmp_path, values, options, message):
    path = cli.write(tmp_path / "all.jsonl", values)
    [(status, errors)] = ranks.run(tiny.cli, "data", *winrate(path, tmp_path / "out.jsonl", model, *options), world=1)
    assert status == 2 and message in errors
    assert [entry.name for entry in tmp_path.iterdir()] == ["all.jsonl"]


def test_the_model_is_named_where_it_is_missing(tmp_path):
    path = cli.write(tmp_path / "all.jsonl", [{"prompt": "p", "answer": 1}])
    assert "needs --model.path=HF" in cli.refused("winrate", path, f"--out={tmp_path / 'out.jsonl'}")


@pytest.mark.full
@pytest.mark.timeout(600)
def test_two_ranks_and_a_killed_process_give_the_same_rates(ranks, model, records, tmp_path):
    whole, shared, killed = (tmp_path / name for name in ("whole.jsonl", "shared.jsonl", "killed.jsonl"))
    assert ranks.run(tiny.cli, "data", *winrate(records, whole, model), world=1, deadline=240)[0][0] == 0
    for status, errors in ranks.run(tiny.cli, "data", *winrate(records, shared, model), world=2, deadline=240):
        assert status == 0, errors
    assert shared.read_bytes() == whole.read_bytes()

    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}:{os.environ.get('PYTHONPATH', '')}"}
    command = [sys.executable, "-m", "pctrain", "data", *winrate(records, killed, model)]
    progress = tmp_path / "killed.jsonl.partial" / "progress.jsonl"
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL)
    while process.poll() is None and not (progress.exists() and progress.read_bytes().count(b"\n") > 8):
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL and not killed.exists()
    subprocess.run(command, env=environment, check=True, stdout=subprocess.DEVNULL, timeout=240)
    assert killed.read_bytes() == whole.read_bytes()
