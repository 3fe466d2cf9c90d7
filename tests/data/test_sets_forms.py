"""The commands on trajectory sets take every format that training takes, and write all columns in any format."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pctrain.data.sources import iter_raw
from pctrain.data.writing import write_records
from tests.helpers import sets_cli as cli

ROOT = Path(__file__).resolve().parents[2]
RETU = [
    {
        "data_source": "x",
        "prompt": [{"role": "user", "content": f"Solve {i % 7} now"}],
        "ability": "math",
        "reward_model": {"ground_truth": str(i), "style": "rule"},
        "extra_info": {"question": f"Solve {i % 7} now", "answer": "r" * i, "index": i},
        "win_rate": i % 5 / 4,
    }
    for i in range(40)
]
CHATS = [
    {
        "messages": [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": f"Solve {i % 7}"},
            {"role": "assistant", "content": f"It is {i}."},
        ],
        "tags": ["a", str(i)],
        "win_rate": i % 5 / 4,
    }
    for i in range(40)
]


def values(path):
    return [value for _, value in iter_raw(path)]


@pytest.fixture(params=["parquet", "jsonl.zst", "chat.jsonl.gz", "data set", "glob"])
def source(request, tmp_path):
    """(what is given to the command, its records)"""
    if request.param == "data set":
        import datasets

        datasets.disable_progress_bars()
        datasets.Dataset.from_list(CHATS).save_to_disk(tmp_path / "set")
        return tmp_path / "set", CHATS
    if request.param == "glob":
        for part in range(2):
            cli.write(tmp_path / f"part-{part}.jsonl", RETU[part * 20 : part * 20 + 20])
        return f"{tmp_path}/part-*.jsonl", RETU
    records = CHATS if "chat" in request.param else RETU
    write_records(tmp_path / f"all.{request.param}", records)
    return tmp_path / f"all.{request.param}", records


@pytest.mark.parametrize("suffix", ["jsonl", "jsonl.gz", "parquet"])
def test_all_columns_come_through(source, tmp_path, suffix):
    path, records = source
    out = tmp_path / f"out.{suffix}"
    cli.run("select", path, f"--out={out}", "--take=hard")
    assert values(out) == [record for record in records if record["win_rate"] <= 0.25]
    assert cli.manifest(out)["outputs"][0]["records"] == 16


def test_every_command_reads_every_form(source, tmp_path):
    path, records = source
    cli.run("split", path, f"--out={tmp_path / 'split'}", "--validation=12")
    names = sorted(entry.name for entry in (tmp_path / "split").iterdir())
    suffix = {"parquet": ".parquet", "zst": ".jsonl.zst", "gz": ".jsonl.gz"}.get(str(path).rpartition(".")[2], ".jsonl")
    assert names == ["dropped.jsonl", "manifest.json", f"train{suffix}", f"validation{suffix}"]
    train, validation = (values(tmp_path / "split" / f"{side}{suffix}") for side in ("train", "validation"))
    assert len(validation) in (11, 12) and sorted(map(str, train + validation)) == sorted(map(str, records))

    cli.run("dedup", path, f"--out={tmp_path / 'unique.parquet'}", "--by=question")
    assert values(tmp_path / "unique.parquet") == records[:7]
    against = cli.write(tmp_path / "bench.jsonl", [{"prompt": "SOLVE 3 now"}, {"prompt": "Be brief. Solve 3"}])
    cli.run("decontaminate", path, f"--against={against}", f"--out={tmp_path / 'clean.jsonl'}")
    assert values(tmp_path / "clean.jsonl") == [record for i, record in enumerate(records) if i % 7 != 3]


def test_the_result_does_not_depend_on_the_number_of_processes(tmp_path):
    """9 MB: two parts of a file, and two processes where they are asked for."""
    records = [{"prompt": f"{'w ' * (i % 11)} question {i // 3}", "response": "word " * 6000} for i in range(300)]
    path = cli.write(tmp_path / "all.jsonl", records)
    for workers in (1, 2):
        cli.run("dedup", path, f"--out={tmp_path / f'{workers}.jsonl'}", "--by=question", f"--data.workers={workers}")
    assert (tmp_path / "1.jsonl").read_bytes() == (tmp_path / "2.jsonl").read_bytes()
    dropped = [cli.dropped(tmp_path / f"{workers}.jsonl") for workers in (1, 2)]
    assert dropped[0] == dropped[1] != []


def test_a_killed_command_leaves_no_output_and_runs_again(tmp_path):
    path = cli.write(tmp_path / "all.jsonl", [{"prompt": f"q{i}", "response": "word " * 3000} for i in range(900)])
    out = tmp_path / "out.jsonl"
    command = [sys.executable, "-m", "pctrain", "data", "dedup", str(path), f"--out={out}", "--near=false"]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL)
    partial = tmp_path / "out.jsonl.partial"
    while process.poll() is None and not list(partial.glob("out.jsonl*")):
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert not out.exists() and not list(tmp_path.glob("out.jsonl.m*"))
    subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL, env=dict(os.environ))
    assert out.read_bytes() == path.read_bytes()
    assert sorted(entry.name for entry in tmp_path.iterdir()) == [
        "all.jsonl",
        "out.jsonl",
        "out.jsonl.dropped.jsonl",
        "out.jsonl.manifest.json",
    ]
