"""Checkpoint folders: what makes one complete, what can be wrong with one, and which are kept."""

import json
import os
import shutil
import subprocess
import sys
import threading
import time

import pytest

from pctrain.common.errors import UserError
from pctrain.compute.ledger import SUMS
from pctrain.config.tree import Config
from pctrain.run import checkpoints
from pctrain.run.checkpoint_state import read_state
from pctrain.run.checkpoints import checkpoint_fault, checkpoint_step, list_checkpoints
from pctrain.run.folder import RunFolder


@pytest.fixture
def config(tmp_path):
    return Config.model_validate({"run": {"dir": tmp_path / "run", "tensorboard": False}})


def add_checkpoint(run, step):
    folder = run.begin_checkpoint(step)
    for name in ("weights.bin", "inner/state.json"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(f"content of {step}")
    return run.commit_checkpoint(folder, step, {"layout": {"world": 1}})


def test_the_newest_checkpoint_is_found_by_number(config):
    with RunFolder.open(config, "sft", []) as run:
        for step in (50, 100, 9):
            add_checkpoint(run, step)
        assert run.latest_checkpoint() == run.checkpoint_path(100)
        assert [checkpoint_step(path) for path in list_checkpoints(run.path)] == [9, 50, 100]


def test_the_manifest_describes_the_checkpoint(config, tmp_path):
    data = tmp_path / "train.jsonl"
    data.write_text("{}\n")
    with RunFolder.open(config, "sft", [data]) as run:
        manifest = json.loads((add_checkpoint(run, 50) / "manifest.json").read_text())
    assert manifest["step"] == 50 and manifest["kind"] == "sft" and manifest["layout"] == {"world": 1}
    assert manifest["fingerprints"] == {
        str(data): "ca3d163bab055381827226140568f3bef7eaac187cebd76878e0b63e9e442356"
    }  # in the format of sha256sum
    assert manifest["files"].keys() == {"inner/state.json", "weights.bin"}
    assert manifest["files"]["weights.bin"] == {
        "bytes": 13,
        "sha256": "9e4c4e308291b4a49ffc30eb1bafe6c562fb0a712ca0d09654638a88998458a9",
    }


def test_the_hash_of_the_config_does_not_depend_on_the_layout(config):
    from pctrain.run.config_file import config_hash

    before = config_hash(config)
    config.parallel.tensor, config.run.keep_last = 2, 3
    assert config_hash(config) == before
    config.sft.optimizer.lr = 3e-4
    assert config_hash(config) != before


def damage(path, how):
    file = path / "weights.bin"
    if how == "missing":
        file.unlink()
    elif how == "truncated":
        os.truncate(file, 4)
    elif how == "altered":
        file.write_bytes(file.read_bytes().replace(b"content", b"c0ntent"))
    else:
        (path / "manifest.json").unlink()


@pytest.mark.parametrize(
    "how, message",
    [
        ("missing", "weights.bin is missing"),
        ("truncated", "weights.bin has 4 bytes, expected 14"),
        ("manifest", "manifest.json is missing"),
    ],
)
def test_a_damaged_checkpoint_is_named_with_a_way_out(config, how, message):
    with RunFolder.open(config, "sft", []) as run:
        for step in (100, 150, 200):
            add_checkpoint(run, step)
        damage(run.checkpoint_path(200), how)
        with pytest.raises(UserError, match=message) as error:
            run.latest_checkpoint()
        assert "delete step-200 to resume from step-150" in str(error.value)
        damage(run.checkpoint_path(150), how)
        with pytest.raises(UserError, match="delete step-150 and step-200 to resume from step-100"):
            run.latest_checkpoint()
        for step in (150, 200):
            shutil.rmtree(run.checkpoint_path(step))
        assert run.latest_checkpoint() == run.checkpoint_path(100)
        damage(run.checkpoint_path(100), how)
        with pytest.raises(UserError, match="delete step-100 to start this run over"):
            run.latest_checkpoint()


def test_an_altered_file_is_named_and_never_offered(config):
    with RunFolder.open(config, "sft", []) as run:
        for step in (100, 150, 200):
            add_checkpoint(run, step)
        for step in (150, 200):
            damage(run.checkpoint_path(step), "altered")
        fault = checkpoint_fault(run.checkpoint_path(200))
        assert "step-200/weights.bin was altered" in fault
        assert "resume from step-100" in str(checkpoints.damaged(run.checkpoint_path(200), fault))
        assert f"such as {run.checkpoint_path(100)}" in str(checkpoints.damaged_start(run.checkpoint_path(200), fault))


def test_a_checkpoint_is_never_overwritten(config):
    with RunFolder.open(config, "sft", []) as run:
        add_checkpoint(run, 1)
        with pytest.raises(FileExistsError):
            add_checkpoint(run, 1)


ALL = [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize(
    "keep_last, keep_every, left",
    [
        (None, None, ALL),
        (None, 3, ALL),
        (1, None, [6]),
        (2, None, [5, 6]),
        (1, 3, [3, 6]),
        (2, 2, [2, 4, 5, 6]),
        (9, None, ALL),
    ],
)
def test_retention(config, keep_last, keep_every, left):
    config.run.keep_last, config.run.keep_every = keep_last, keep_every
    with RunFolder.open(config, "sft", []) as run:
        for step in range(1, 7):
            add_checkpoint(run, step)
        assert [checkpoint_step(path) for path in list_checkpoints(run.path)] == left
        assert not list(run.path.rglob("*.tmp"))


def test_retention_keeps_the_newest_complete_one(config):
    with RunFolder.open(config, "sft", []) as run:
        for step in range(1, 5):
            add_checkpoint(run, step)
        for step in (3, 4):
            damage(run.checkpoint_path(step), "truncated")
        assert checkpoints.retire(run.path, 1, None) == [1, 3]
        assert [checkpoint_step(path) for path in list_checkpoints(run.path)] == [2, 4]


def test_a_writer_that_outlives_its_run_cannot_reach_the_next_attempt(config):
    with RunFolder.open(config, "sft", []) as run:
        old, new = run.begin_checkpoint(5), run.begin_checkpoint(5)
        assert old != new
        checkpoints.remove_folder(old)
        with pytest.raises(FileNotFoundError):
            (old / "weights.bin").write_bytes(b"x")


def test_a_folder_is_deleted_though_something_still_writes_into_it(tmp_path):
    folder = tmp_path / "step-5.tmp"
    folder.mkdir()
    stop = time.monotonic() + 0.3

    def write():
        try:
            for number in range(10**9):
                if time.monotonic() > stop:
                    return
                (folder / str(number)).write_bytes(b"x")
        except FileNotFoundError:
            return

    writer = threading.Thread(target=write)
    writer.start()
    checkpoints.remove_folder(folder)
    writer.join()
    assert not folder.exists()


KILLED = """
import sys
from pctrain.config.tree import Config
from pctrain.run.folder import RunFolder
config = Config.model_validate({"run": {"dir": sys.argv[1], "tensorboard": False, "keep_last": 3}})
run = RunFolder.open(config, "sft", [])
print("open", flush=True)
step = 0
while True:
    step += 1
    run.record(step, "train", {"loss": 1.0, "long": "x" * 20000})
    folder = run.begin_checkpoint(step)
    for name in range(5):
        (folder / str(name)).write_bytes(b"y" * 30000)
    run.commit_checkpoint(folder, step, {})
"""


@pytest.mark.parametrize("seconds", [0.05, 0.11, 0.17])
def test_sigkill_at_any_moment_leaves_whole_checkpoints_and_lines(config, seconds):
    worker = subprocess.Popen(
        [sys.executable, "-c", KILLED, str(config.run.dir)],
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert worker.stdout.readline() == "open\n"
    time.sleep(seconds)
    worker.kill()
    worker.wait()
    with RunFolder.open(config, "sft", []) as run:
        assert not list(run.path.rglob("*.tmp"))
        newest = run.latest_checkpoint()
        assert all(checkpoint_fault(path) is None for path in list_checkpoints(run.path))
        assert len(list_checkpoints(run.path)) <= 4
        last = checkpoint_step(newest) if newest else 0
        run.rewind(last)
    metrics = config.run.dir / "metrics.jsonl"
    steps = [line["step"] for line in (map(json.loads, metrics.read_text().splitlines()) if metrics.exists() else [])]
    assert steps == list(range(1, last + 1))


def test_an_invalid_state_is_named(tmp_path):
    sums = dict.fromkeys(sorted(SUMS), 1.0)
    state = {
        "ledger": {"joint": 0.0, "totals": {"sft_update": sums}},
        "validations": [[1, 0.1, 2.0, 0.1, True]],
        "recent_losses": [2.0],
        "prompts": {"position": 3, "carried": [1]},
    }
    file = tmp_path / "state.json"
    file.write_text(json.dumps(state))
    assert read_state(tmp_path) == state
    for changed, words in (
        ({"ledger": 3}, "`ledger.totals` is missing"),
        ({"ledger": {"joint": None, "totals": {}}}, "a number in"),
        ({"ledger": {"joint": 0, "totals": {"a": {}}}}, "`ledger.totals` must have"),
        ({"prompts": []}, "`prompts` must have"),
        ({"prompts": {"position": 1.5, "carried": []}}, "not a whole number"),
        ({"validations": [[1]]}, "list of lists of 5"),
        ({"recent_losses": [float("nan")]}, "a number in"),
        ({"skipped_in_a_row": "x"}, "not a whole number"),
    ):
        file.write_text(json.dumps(state | changed))
        with pytest.raises(UserError, match=f"{file}: .*{words}"):
            read_state(tmp_path)
    file.write_text(json.dumps({"ledger": state["ledger"]}))
    assert read_state(tmp_path).keys() == {"ledger"}
    with pytest.raises(UserError, match="`prompts` is missing"):
        read_state(tmp_path, "prompts")
    file.write_text("[" * 100_000)
    with pytest.raises(UserError, match=f"{file}: not valid JSON"):
        read_state(tmp_path)
    (tmp_path / "manifest.json").write_text("[" * 100_000)
    fault = checkpoint_fault(tmp_path)
    assert fault == f"{tmp_path / 'manifest.json'}: not valid JSON (it is nested too deeply)"
