"""Tokenised data on the disk: what goes in comes out, in order, however it was cut, killed, or built by two at once."""

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pctrain.common.errors import UserError
from pctrain.config.tree import DataConfig, FieldsConfig
from pctrain.data import build as build_module
from pctrain.data import sources, store
from pctrain.data.build import TokenJob, build, folder_of
from pctrain.data.encode import Encoder
from pctrain.data.sources import read_records
from pctrain.data.store import TokenStore
from tests.helpers import chat_models

BUILDER = Path(__file__).with_name("token_builder.py")


@pytest.fixture(scope="module")
def hf_dir(tmp_path_factory):
    return chat_models.make(tmp_path_factory.mktemp("model") / "qwen2_5", "qwen2_5")


def record(number):
    rng = random.Random(number)
    return {"prompt": f"What is {number} + 1?", "response": f"It is {number + 1}" + " indeed" * rng.randrange(30) + "."}


def write(path, records):
    path.write_text("".join((json.dumps(value) if isinstance(value, dict) else value) + "\n" for value in records))
    return path


def made(cache, job):
    folder = folder_of(cache, job)
    steps = list(build(job, folder))
    return TokenStore(folder), steps


def tiny_chunks(monkeypatch, size=2000):
    monkeypatch.setattr(build_module, "CHUNK_BYTES", size)


# ---- what is in it


@pytest.mark.parametrize("workers", [1, 2])
def test_samples_come_in_the_order_of_files_and_records(hf_dir, tmp_path, monkeypatch, workers):
    tiny_chunks(monkeypatch)
    files = [
        write(tmp_path / "b.jsonl", map(record, range(60))),
        write(tmp_path / "a.jsonl", [record(60) | {"id": "own"}, record(61)]),
    ]
    data = DataConfig(workers=workers)
    tokens, steps = made(tmp_path / "cache", TokenJob(files, hf_dir, data, 4096))
    encoder = Encoder(hf_dir, data, 4096)
    records = [r for file in files for r in read_records(file, FieldsConfig(), need=("response",))]
    assert [tokens.id(i) for i in range(len(tokens))] == [*(f"b.jsonl:{n}" for n in range(1, 61)), "own", "a.jsonl:2"]
    for i, (row, expected) in enumerate(zip(tokens, map(encoder.encode, records), strict=True)):
        assert row.tokens.tolist() == expected.tokens.tolist() and row.tokens.dtype == np.int64
        assert row.weights.nonzero()[0].tolist() == list(range(*expected.spans[0])) and row.weights.dtype == np.float32
        assert set(row.weights) == {0, 1} and row.weights[0] == 0 and row.streams == {}
        assert tokens.lengths[i] == len(row) and tokens.loss_tokens[i] == row.weights.sum()
    assert tokens.lengths.dtype == tokens.loss_tokens.dtype == np.int32
    assert tokens.tokens == tokens.lengths.sum() == steps[-1].tokens and steps[-1].records == len(tokens) == 62
    assert steps[-1].done == steps[-1].total > 5 and tokens.counts == {}
    assert tokens.manifest["files"] == [{"path": str(files[0]), "records": 60}, {"path": str(files[1]), "records": 2}]
    assert list(build(TokenJob(files, hf_dir, data, 4096), tokens.folder)) == []  # what is there is not made again
    for index in (-1, 62):
        with pytest.raises(IndexError):
            tokens[index]


TURNS = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes."}]


@settings(max_examples=6)
@given(
    st.lists(st.tuples(st.integers(0, 99), st.integers(1, 3)), min_size=2, max_size=6), st.sampled_from([1, 200, 700])
)
def test_where_files_are_cut_does_not_matter(hf_dir, tmp_path_factory, chats, size):
    folder = tmp_path_factory.mktemp("chats")
    values = [
        {"messages": [{**turn, "content": turn["content"] + f" {n}"} for turn in TURNS * turns]} for n, turns in chats
    ]
    job = TokenJob([write(folder / "c.jsonl", values)], hf_dir, DataConfig(loss_on="all"), 4096)
    whole, _ = made(folder / "whole", job)
    with pytest.MonkeyPatch.context() as patch:
        tiny_chunks(patch, size)
        cut, _ = made(folder / "cut", job)
    assert cut.folder.name == whole.folder.name and len(cut) == len(whole) == len(chats)
    for i, (a, b) in enumerate(zip(cut, whole, strict=True)):
        assert (
            a.tokens.tolist() == b.tokens.tolist()
            and a.weights.tolist() == b.weights.tolist()
            and cut.id(i) == whole.id(i)
        )
        assert a.weights.sum() == cut.loss_tokens[i] == whole.loss_tokens[i] > 0


def test_a_large_vocabulary_keeps_its_ids(tmp_path):
    directory = chat_models.make(tmp_path / "model", "chatml")
    path = directory / "tokenizer.json"
    raw = json.loads(path.read_text())
    raw["model"]["vocab"] |= {f"unused{i}": 1000 + i for i in range(70_000)}  # 16 bits end at 65,535
    path.write_text(json.dumps(raw))
    (directory / "config.json").unlink()
    eos = Encoder(directory, DataConfig(), 99).tokenizer.eos_id
    tokens, _ = made(
        tmp_path / "cache", TokenJob([write(tmp_path / "a.jsonl", [record(0)])], directory, DataConfig(), 4096)
    )
    assert tokens.manifest["dtype"] == "int32" and tokens[0].tokens[-1] == eos > 65_535


def test_a_data_set_on_disk_and_an_archive(hf_dir, tmp_path):
    import gzip

    datasets = pytest.importorskip("datasets", reason="needs datasets")
    values = [record(n) for n in range(20)]
    datasets.Dataset.from_list(values).save_to_disk(tmp_path / "set", num_shards=2)
    plain = write(tmp_path / "a.jsonl", values)
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(plain.read_bytes()))
    expected, _ = made(tmp_path / "cache", TokenJob([plain], hf_dir, DataConfig(), 4096))
    for path in (tmp_path / "set", tmp_path / "a.jsonl.gz"):
        tokens, _ = made(tmp_path / "cache", TokenJob(sources.list_files(path), hf_dir, DataConfig(), 4096))
        assert [row.tokens.tolist() for row in tokens] == [row.tokens.tolist() for row in expected]
        assert tokens.id(19).startswith(f"{path.name}:")


# ---- policies and counts

LIMIT = 400


def mixed(tmp_path):
    long = {"prompt": "p", "response": "word " * 300}
    return write(
        tmp_path / "mixed.jsonl",
        [record(0), "{", {"prompt": "p"}, long, record(1), {"prompt": "p", "response": "\n\nYes."}],
    )


def test_what_is_dropped_is_counted_and_listed(hf_dir, tmp_path):
    job = TokenJob([mixed(tmp_path)], hf_dir, DataConfig(overlong="drop", unusable="drop"), LIMIT)
    tokens, _ = made(tmp_path / "cache", job)
    assert (
        tokens.counts == {"malformed_json": 1, "missing_field": 1, "overlong": 1, "token_boundary": 1}
        and len(tokens) == 2
    )
    assert [tokens.id(i) for i in range(2)] == ["mixed.jsonl:1", "mixed.jsonl:5"]
    dropped = [json.loads(line) for line in (tokens.folder / "dropped.jsonl").read_text().splitlines()]
    assert [(Path(d["where"]).name, d["cause"]) for d in dropped] == [
        ("mixed.jsonl:2", "malformed_json"),
        ("mixed.jsonl:3", "missing_field"),
        ("mixed.jsonl:4", "overlong"),
        ("mixed.jsonl:6", "token_boundary"),
    ]
    assert all(d["message"] for d in dropped)


def test_what_is_cut_is_counted_and_kept(hf_dir, tmp_path):
    tokens, _ = made(
        tmp_path / "cache", TokenJob([mixed(tmp_path)], hf_dir, DataConfig(overlong="right", unusable="drop"), LIMIT)
    )
    assert (
        tokens.counts == {"malformed_json": 1, "missing_field": 1, "token_boundary": 1, "cut": 1} and len(tokens) == 3
    )
    assert len(tokens[1]) == LIMIT and tokens[1].weights[-1] == 1


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize(
    "data, message",
    [
        ({}, "mixed.jsonl:42: malformed JSON"),
        ({"unusable": "drop"}, r"mixed.jsonl:44: the sample has \d+ tokens .*more than 400"),
        ({"overlong": "drop"}, "mixed.jsonl:42: malformed JSON"),
    ],
)
def test_a_record_that_stops_is_named_and_leaves_nothing(hf_dir, tmp_path, monkeypatch, workers, data, message):
    tiny_chunks(monkeypatch, 500)
    lines = mixed(tmp_path).read_text().splitlines()
    file = write(tmp_path / "mixed.jsonl", [json.dumps(record(n)) for n in range(40)] + lines * 3)
    job = TokenJob([file], hf_dir, DataConfig(workers=workers, **data), LIMIT)
    with pytest.raises(UserError, match=message):  # the first one, whichever worker is the faster
        made(tmp_path / "cache", job)
    assert [p.suffix for p in (tmp_path / "cache").iterdir() if p.name != "hashes.json"] == [".lock"]
    with pytest.raises(UserError, match="has no finished set of tokens"):
        TokenStore(folder_of(tmp_path / "cache", job))


def test_a_set_with_nothing_left_is_refused(hf_dir, tmp_path):
    job = TokenJob([write(tmp_path / "a.jsonl", ["{", "{", "[]"])], hf_dir, DataConfig(unusable="drop"), 100)
    with pytest.raises(
        UserError,
        match=r"none of the 3 records can be used \(2 malformed_json, 1 not_an_object\)\. The first is .*a.jsonl:1",
    ):
        made(tmp_path / "cache", job)
    with pytest.raises(UserError, match=r"b.jsonl: the data set is empty"):
        made(tmp_path / "cache", TokenJob([write(tmp_path / "b.jsonl", [])], hf_dir, DataConfig(), 100))


# ---- the key


def test_the_folder_follows_the_content_and_the_settings(hf_dir, tmp_path):
    file = write(tmp_path / "a.jsonl", map(record, range(3)))
    base = TokenJob([file], hf_dir, DataConfig(), 100)

    def name(job=base):
        return folder_of(tmp_path / "cache", job).name

    first = name()
    os.utime(file)
    moved = tmp_path / "elsewhere"
    moved.mkdir()
    file.rename(moved / "a.jsonl")
    assert name(TokenJob([moved / "a.jsonl"], hf_dir, DataConfig(workers=7), 100)) == first
    (moved / "a.jsonl").rename(file)
    other = write(tmp_path / "b.jsonl", map(record, range(3)))
    names = [
        first,
        name(TokenJob([other], hf_dir, DataConfig(), 100)),
        name(TokenJob([file, other], hf_dir, DataConfig(), 100)),
        name(TokenJob([other, file], hf_dir, DataConfig(), 100)),
        name(TokenJob([file], hf_dir, DataConfig(), 101)),
        name(TokenJob([file], hf_dir, DataConfig(loss_on="all"), 100)),
        name(TokenJob([file], hf_dir, DataConfig(template="none"), 100)),
        name(TokenJob([file], hf_dir, DataConfig(fields=FieldsConfig(prompt="response")), 100)),
    ]
    state = file.stat()
    file.write_text(file.read_text().replace("0", "9"))  # as long as before
    os.utime(file, ns=(state.st_atime_ns, state.st_mtime_ns + 1))
    names.append(name())
    assert len(set(names)) == len(names)


def test_files_are_hashed_once(hf_dir, tmp_path, monkeypatch):
    hashed = []
    monkeypatch.setattr(
        build_module, "fingerprint", lambda file, real=build_module.fingerprint: hashed.append(file) or real(file)
    )
    file = write(tmp_path / "a.jsonl", [record(0)])
    job = TokenJob([file], hf_dir, DataConfig(), 100)
    folder_of(tmp_path / "cache", job)
    folder_of(tmp_path / "cache", job)
    assert hashed == [file, file]  # it has just been written: it could change again within one tick of the clock
    os.utime(file, (1e9, 1e9))
    folder_of(tmp_path / "cache", job)
    folder_of(tmp_path / "cache", job)
    assert hashed == [file] * 3
    (tmp_path / "cache" / "hashes.json").write_text("{")
    folder_of(tmp_path / "cache", job)
    assert hashed == [file] * 4


# ---- kills, two at once, damage


@pytest.fixture
def many(tmp_path):
    return write(tmp_path / "many.jsonl", map(record, range(1000)))


@pytest.fixture
def builder(hf_dir):
    """`builder(cache, file)`: two workers and their parent in their own session, which ends with the test."""
    started = []

    def start(cache, file):
        command = [sys.executable, str(BUILDER), str(cache), str(hf_dir), "8000", "2", str(file)]
        started.append(
            subprocess.Popen(
                command,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                start_new_session=True,
                env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
            )
        )
        return started[-1]

    yield start
    for process in started:
        for pid in processes_of(process.pid):
            os.kill(pid, signal.SIGKILL)


def wait_for(condition, seconds=30):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.005)


def processes_of(session):
    """Processes of a session that still run."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except (FileNotFoundError, ProcessLookupError):
            continue
        if int(fields[3]) == session and fields[0] != "Z":
            found.append(int(stat.parent.name))
    return found


def shards(cache):
    return {file.name: file.stat().st_mtime_ns for file in cache.glob("*/shard-*.json")}


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_a_stopped_build_leaves_no_process_and_goes_on_where_it_was(builder, hf_dir, tmp_path, many, how):
    cache = tmp_path / "cache"
    process = builder(cache, many)
    wait_for(lambda: len(shards(cache)) >= 3)
    process.send_signal(how)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == -how, errors
    wait_for(lambda: not processes_of(process.pid))
    before = shards(cache)
    assert not list(cache.glob("*/manifest.json")) and before
    tokens_before = {file.name: file.stat().st_mtime_ns for file in cache.glob("*/shard-*.tokens")}

    again = builder(cache, many)
    output, errors = again.communicate(timeout=60)
    assert again.returncode == 0, errors
    folder = Path(output.splitlines()[-1])
    for name in before:  # not made again
        name = name.replace(".json", ".tokens")
        assert (folder / name).stat().st_mtime_ns == tokens_before[name]
    assert not list(folder.glob("*.tmp")) and not list(folder.glob("shard-*.json"))
    fresh, _ = made(tmp_path / "fresh", TokenJob([many], hf_dir, DataConfig(), 4096))
    found = TokenStore(folder)
    assert len(found) == len(fresh) == 1000 and found.manifest["files"] == fresh.manifest["files"]
    for i in range(0, 1000, 37):
        assert found[i].tokens.tolist() == fresh[i].tokens.tolist() and found.id(i) == fresh.id(i)


def test_two_builders_at_once_build_once(builder, tmp_path, many):
    both = [builder(tmp_path / "cache", many) for _ in range(2)]
    outputs = []
    for process in both:
        output, errors = process.communicate(timeout=60)
        assert process.returncode == 0, errors
        outputs.append(output.splitlines())
    assert outputs[0][-1] == outputs[1][-1] and len(TokenStore(outputs[0][-1])) == 1000
    built = [any(re.fullmatch(r"shards [1-9]\d*/\d+", line) for line in lines) for lines in outputs]
    assert sorted(built) == [False, True]


def test_a_dead_worker_is_told(hf_dir, tmp_path, monkeypatch, many):
    tiny_chunks(monkeypatch, 8000)
    job = TokenJob([many], hf_dir, DataConfig(workers=2), 4096)
    folder = folder_of(tmp_path / "cache", job)
    others = set(children())  # the ranks of other tests among them
    steps = build(job, folder)
    while next(steps).done < 3:
        pass
    (worker, *_) = [
        pid for pid in children() if pid not in others and b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes()
    ]
    os.kill(worker, signal.SIGKILL)
    with pytest.raises(UserError, match=r"a worker process has died.*fewer data.workers"):
        list(steps)
    assert len(TokenStore(made(tmp_path / "cache", job)[0].folder)) == 1000  # the finished shards were kept


def children():
    return [int(pid) for task in Path("/proc/self/task").iterdir() for pid in (task / "children").read_text().split()]


def test_shards_of_other_parts_are_made_again(hf_dir, tmp_path, monkeypatch, many):
    job = TokenJob([many], hf_dir, DataConfig(workers=1), 4096)
    folder = folder_of(tmp_path / "cache", job)
    tiny_chunks(monkeypatch, 8000)
    steps = build(job, folder)
    while next(steps).done < 3:
        pass
    steps.close()
    assert len(list(folder.glob("shard-*.json"))) >= 3
    tiny_chunks(monkeypatch, 50_000)  # as another version of the program might cut files
    tokens, _ = made(tmp_path / "cache", job)
    assert [tokens.id(i) for i in range(1000)] == [f"many.jsonl:{n}" for n in range(1, 1001)]


def test_damage_is_named(hf_dir, tmp_path):
    tokens, _ = made(
        tmp_path / "cache", TokenJob([write(tmp_path / "a.jsonl", map(record, range(5)))], hf_dir, DataConfig(), LIMIT)
    )
    shard = tokens.folder / "shard-00000.tokens"
    os.truncate(shard, shard.stat().st_size - 1)
    assert len(tokens[0]) > 0
    with pytest.raises(UserError, match=f"{shard} is shorter than manifest.json says. Delete {tokens.folder}"):
        tokens[4]
    shard.unlink()
    with pytest.raises(UserError, match=f"{shard} cannot be read: No such file"):
        TokenStore(tokens.folder)[0]
    manifest = tokens.folder / "manifest.json"
    manifest.write_text(json.dumps({"format": 0}))
    with pytest.raises(UserError, match="tokens of format 0; expected 1"):
        TokenStore(tokens.folder)
    manifest.write_text("{")
    with pytest.raises(UserError, match="not valid JSON"):
        TokenStore(tokens.folder)


def test_a_cache_that_cannot_be_written(hf_dir, tmp_path):
    (tmp_path / "cache").write_text("")
    file = write(tmp_path / "a.jsonl", [record(0)])
    with pytest.raises(UserError, match=r"cache.*set data.cache"):
        made(tmp_path / "cache", TokenJob([file], hf_dir, DataConfig(), 100))
    with pytest.raises(UserError, match=r"none.jsonl cannot be read: No such file"):
        folder_of(tmp_path / "other", TokenJob([tmp_path / "none.jsonl"], hf_dir, DataConfig(), 100))


def test_few_files_are_open_at_a_time(hf_dir, tmp_path, monkeypatch):
    tiny_chunks(monkeypatch, 500)
    monkeypatch.setattr(store, "OPEN_FILES", 4)
    file = write(tmp_path / "a.jsonl", map(record, range(100)))
    tokens, steps = made(tmp_path / "cache", TokenJob([file], hf_dir, DataConfig(workers=1), 999))
    assert steps[-1].total > 15
    expected = [row.tokens.tolist() for row in tokens]
    order = [random.Random(0).randrange(100) for _ in range(300)]
    with ThreadPoolExecutor(4) as threads:  # while one reads, another closes what it does not need
        assert all(threads.map(lambda i: tokens[i].tokens.tolist() == expected[i], order))
    open_files = [os.readlink(link) for link in Path("/proc/self/fd").iterdir() if link.exists()]
    assert 1 <= sum(name.startswith(str(tokens.folder)) for name in open_files) <= 4


def test_an_index_that_does_not_fit_is_named(hf_dir, tmp_path):
    """Rows would be read from the wrong place, or beyond the end of their file."""
    tokens, _ = made(
        tmp_path / "cache", TokenJob([write(tmp_path / "a.jsonl", map(record, range(5)))], hf_dir, DataConfig(), LIMIT)
    )
    file = tokens.folder / "index.npz"
    whole = file.read_bytes()
    with np.load(file) as index:
        arrays = dict(index)
    for name, changed in {
        "lengths": -arrays["lengths"],
        "spans": arrays["spans"] * 1000,
        "shards": arrays["shards"] + 1,
        "span_counts": arrays["span_counts"].astype(float),
        "spans ": arrays["spans"][:-1],
    }.items():
        np.savez(file, **arrays | {name.strip(): changed})
        with pytest.raises(UserError, match=f"{file} is damaged .*. Delete {tokens.folder}"):
            TokenStore(tokens.folder)
    file.write_bytes(whole[:-30])
    with pytest.raises(UserError, match=f"{file} is damaged"):
        TokenStore(tokens.folder)
    file.write_bytes(whole)
    manifest = json.loads((tokens.folder / "manifest.json").read_text())
    (tokens.folder / "manifest.json").write_text(json.dumps(manifest | {"dtype": "object"}))
    with pytest.raises(UserError, match=r"manifest.json was changed"):
        TokenStore(tokens.folder)
