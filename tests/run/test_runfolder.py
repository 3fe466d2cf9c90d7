"""The run folder: its files, what it refuses, and the state that a kill may leave."""

import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pctrain.common.errors import UserError
from pctrain.config.tree import Config
from pctrain.run.config_file import read_config
from pctrain.run.folder import RunFolder
from pctrain.run.records import best_step


@pytest.fixture
def data(tmp_path):
    file = tmp_path / "train.jsonl"
    file.write_text('{"prompt": "1+1=", "response": "2"}\n')
    return file


@pytest.fixture
def config(tmp_path):
    return Config.model_validate({"run": {"dir": tmp_path / "run", "tensorboard": False}})


def lines(file):
    return [json.loads(line) for line in file.read_text().splitlines()]


def tree(folder):
    """Return every file with its bytes, except the lock."""
    files = (path for path in sorted(Path(folder).rglob("*")) if path.is_file() and path.name != ".lock")
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


# ---- opening ----


def test_a_new_folder_holds_the_resolved_config_and_the_fingerprints(config, data):
    with RunFolder.open(config, "sft", [data]) as run:
        assert run.latest_checkpoint() is None and not run.finished
    stored, kind, fingerprints = read_config(config.run.dir)
    assert stored == config and kind == "sft"
    assert fingerprints.keys() == {str(data)} and len(fingerprints[str(data)]) == 64


def test_the_same_config_opens_it_again(config, data):
    for _ in range(2):
        RunFolder.open(config, "sft", [data]).close()


def test_another_config_is_refused_with_every_differing_key(config, data):
    RunFolder.open(config, "sft", [data]).close()
    before = tree(config.run.dir)
    config.sft.optimizer.lr = 2e-5
    config.sft.steps = 2000
    config.parallel.tensor = 2  # this key may change, so it is not listed
    with pytest.raises(UserError) as error:
        RunFolder.open(config, "sft", [data])
    message = str(error.value)
    assert (
        "sft.optimizer.lr: 1e-05 -> 2e-05" in message and "sft.steps: 1000 -> 2000" in message and "run.dir" in message
    )
    assert "parallel" not in message
    assert tree(config.run.dir) == before


@pytest.mark.parametrize(
    "key, value",
    [
        ("run.tensorboard", True),
        ("parallel.pipeline", 2),
        ("parallel.timeout", 5.0),
        ("reward.workers", 3),
        ("rollout.kv_cache_mb", 64),
        ("rollout.max_sequences", 8),
        ("rollout.gpu_memory", 0.1),
    ],
)
def test_layout_and_sizes_of_helpers_may_change(config, data, key, value):
    RunFolder.open(config, "sft", [data]).close()
    section, name = key.split(".")
    setattr(getattr(config, section), name, value)
    RunFolder.open(config, "sft", [data]).close()
    assert read_config(config.run.dir)[0] == config  # config.yaml has the newest start's config
    assert key in (config.run.dir / "train.log").read_text()


def test_a_moved_folder_resumes(config, data, tmp_path):
    RunFolder.open(config, "sft", [data]).close()
    moved = config.run.dir.rename(tmp_path / "elsewhere")
    config.run.dir = moved
    RunFolder.open(config, "sft", [data]).close()


def test_another_kind_of_run_is_refused(config, data):
    RunFolder.open(config, "sft", [data]).close()
    with pytest.raises(UserError, match="kind sft, not rl"):
        RunFolder.open(config, "rl", [data])


def test_a_changed_data_file_is_named(config, data):
    RunFolder.open(config, "sft", [data]).close()
    with data.open("a") as stream:
        stream.write("\n")
    with pytest.raises(UserError, match=r"train.jsonl has changed"):
        RunFolder.open(config, "sft", [data])


def test_a_missing_data_file_leaves_nothing_behind(config, data):
    with pytest.raises(UserError, match=r"nothere.jsonl: No such file"):
        RunFolder.open(config, "sft", [data, data.with_name("nothere.jsonl")])
    assert not config.run.dir.exists()


def test_a_folder_with_other_things_is_refused_and_left_alone(config, data):
    config.run.dir.mkdir()
    (config.run.dir / "thesis.tex").write_text("years of work")
    with pytest.raises(UserError, match=r"thesis.tex"):
        RunFolder.open(config, "sft", [data])
    assert os.listdir(config.run.dir) == ["thesis.tex"]


def test_generated_data_and_model_may_be_there_before(config, data):
    (config.run.dir / "data").mkdir(parents=True)
    (config.run.dir / "model").mkdir()
    RunFolder.open(config, "sft", [data]).close()


def test_a_damaged_config_is_refused(config, data):
    RunFolder.open(config, "sft", [data]).close()
    (config.run.dir / "config.yaml").write_text("kind: [sft")
    with pytest.raises(UserError, match=r"config.yaml is not valid YAML"):
        RunFolder.open(config, "sft", [data])


@pytest.mark.parametrize(
    "change, named",
    [
        (lambda text: text.replace("sft:", "sft:\n  clip_of_an_older_version: 3"), "sft.clip_of_an_older_version"),
        (lambda text: re.sub(r"\n  steps: \d+", "", text, count=1), ".steps"),
    ],
    ids=["a key that no longer exists", "a key that did not exist yet"],
)
def test_the_run_of_another_version_is_refused_with_a_way_out(config, data, change, named):
    RunFolder.open(config, "sft", [data]).close()
    file = config.run.dir / "config.yaml"
    file.write_text(change(file.read_text()))
    before = tree(config.run.dir)
    for use in (lambda: RunFolder.open(config, "sft", [data]), lambda: read_config(config.run.dir)):
        with pytest.raises(UserError) as error:
            use()
        message = str(error.value)
        assert message.startswith(f"{config.run.dir} is the run of another version of pctrain: its config.yaml ")
        assert f"{named}. This version does not resume it." in message
        assert "Finish the run with the version that began it, or set another run.dir to start over" in message
    assert tree(config.run.dir) == before


def test_other_ranks_write_nothing(config, data):
    run = RunFolder.open(config, "sft", [data], rank=1)
    run.record(1, "train", {"loss": 1.0})
    run.log("step 1")
    run.write_rollouts(1, [{"prompt": "x"}])
    run.record_ledger([{"step": 1}])
    run.rewind(None)
    run.finish({}, "nothing")
    assert not config.run.dir.exists()


# ---- the lock ----


HOLD = """
import sys, time
from pctrain.config.tree import Config
from pctrain.run.folder import RunFolder
import os
run = RunFolder.open(Config.model_validate({"run": {"dir": sys.argv[1], "tensorboard": False}}), "sft", [])
if os.fork() == 0:
    time.sleep(60)  # a forked worker that outlives its parent must not keep the lock
    os._exit(0)
print("open", flush=True)
time.sleep(60)
"""


def test_a_folder_in_use_is_refused_until_its_process_is_killed(config):
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(config.run.dir)],
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
    )
    try:
        assert holder.stdout.readline() == "open\n"
        with pytest.raises(UserError, match=f"in use by process {holder.pid} on"):
            RunFolder.open(config, "sft", [])
        holder.kill()  # the parent only: its forked worker lives on
        holder.wait()
        RunFolder.open(config, "sft", []).close()
    finally:
        os.killpg(holder.pid, signal.SIGKILL)


def test_one_process_cannot_open_a_folder_twice(config):
    with RunFolder.open(config, "sft", []), pytest.raises(UserError, match=f"in use by process {os.getpid()}"):
        RunFolder.open(config, "sft", [])
    RunFolder.open(config, "sft", []).close()


def test_a_forgotten_folder_releases_its_lock(config):
    run = RunFolder.open(config, "sft", [])
    del run
    RunFolder.open(config, "sft", []).close()


# ---- recording ----


def test_metrics_are_one_json_object_a_line(config):
    with RunFolder.open(config, "sft", []) as run:
        run.record(
            1,
            "train",
            {
                "loss": torch.tensor(0.5),
                "tokens": np.int64(7),
                "lr": np.float32(0.25),
                "eflops_sft": 0.1,
                "eflops_rl": 0,
            },
        )
        run.record(1, "val", {"val_loss": float("nan"), "val_tokens": 3, "other": -math.inf})
        text = (config.run.dir / "metrics.jsonl").read_text()  # flushed: readable while the run continues
    assert text == (
        '{"step": 1, "kind": "train", "eflops_sft": 0.1, "eflops_rl": 0, "loss": 0.5, "tokens": 7, "lr": 0.25}\n'
        '{"step": 1, "kind": "val", "val_loss": null, "val_tokens": 3, "other": null}\n'
    )


def test_a_value_that_is_not_a_number_is_an_error_and_writes_no_line(config):
    with RunFolder.open(config, "sft", []) as run:
        with pytest.raises(TypeError, match="object"):
            run.record(1, "train", {"loss": object()})
        with pytest.raises(ValueError, match="expected train, val or eval"):
            run.record(1, "test", {})
    assert not (config.run.dir / "metrics.jsonl").exists()


def test_tensorboard_shows_the_curve_of_the_resumed_run(config):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    config.run.tensorboard = True
    with RunFolder.open(config, "sft", []) as run:
        for step in (1, 2, 3):
            run.record(step, "train", {"loss": float(step), "cause": None})
    with RunFolder.open(config, "sft", []) as run:
        run.rewind(2)
        run.record(3, "train", {"loss": 30.0})
    events = EventAccumulator(str(config.run.dir)).Reload()
    assert [(event.step, event.value) for event in events.Scalars("train/loss")] == [(1, 1.0), (2, 2.0), (3, 30.0)]


# ---- resuming ----


def write_steps(run, first, last):
    for step in range(first, last + 1):
        run.record(step, "train", {"loss": 1 / step})
        run.record_ledger(
            [{"step": step, "phase": "rollout", "seconds": 0.5}, {"step": step, "phase": "rl_update", "seconds": 1}]
        )
        run.write_rollouts(step, [{"prompt": f"p{step}", "response": "line\u2028separator", "kept": True}])
        run.log(f"step {step:5d} | loss {1 / step:.3f}")
        run.log("a remark")


def without_times(files):
    """Remove the time of day from the lines of train.log."""
    return {
        name: b"\n".join(line[19:] for line in data.split(b"\n")) if name == "train.log" else data
        for name, data in files.items()
    }


@pytest.mark.parametrize("checkpoint", [3, 1, None])
def test_rewinding_and_resuming_equals_a_run_that_was_not_killed(config, tmp_path, checkpoint):
    with RunFolder.open(config, "rl", []) as run:
        write_steps(run, 1, 5)
    with RunFolder.open(config, "rl", []) as run:
        run.rewind(checkpoint)
        write_steps(run, (checkpoint or 0) + 1, 7)
    resumed = tree(config.run.dir)
    shutil.rmtree(config.run.dir)
    with RunFolder.open(config, "rl", []) as run:
        write_steps(run, 1, 7)
    assert without_times(resumed) == without_times(tree(config.run.dir))


@given(cut=st.integers(0, 60))
def test_a_torn_last_line_is_cut(cut):
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        config = Config.model_validate({"run": {"dir": f"{folder}/run", "tensorboard": False}})
        with RunFolder.open(config, "sft", []) as run:
            run.record(1, "train", {"loss": 1.0})
            run.record(2, "train", {"loss": 2.0, "and": "something long enough"})
        file = config.run.dir / "metrics.jsonl"
        whole = file.read_bytes()
        torn = whole[: len(whole) - cut]
        file.write_bytes(torn)
        with RunFolder.open(config, "sft", []) as run:
            run.record(3, "train", {"loss": 3.0})
        assert [line["step"] for line in lines(file)] == [*range(1, torn.count(b"\n") + 1), 3]


def test_a_damaged_line_is_named(config):
    with RunFolder.open(config, "sft", []) as run:
        write_steps(run, 1, 3)
        file = run.path / "metrics.jsonl"
        text = file.read_text().splitlines()
        file.write_text("\n".join([text[0], "{oops", text[2], ""]))
        with pytest.raises(UserError, match=r"metrics.jsonl:2"):
            run.rewind(1)


# ---- the end ----


def test_a_finished_run_names_the_next_command_and_is_left_alone(config, capsys):
    command = (
        "pctrain rl --config configs/some-rather-long-name-of-a-config.yaml "
        "--model.checkpoint=runs/a/checkpoints/step-540 --seed=1"
    )
    with RunFolder.open(config, "sft", []) as run:
        run.write_start({"start_step": 3})
        write_steps(run, 1, 2)
        run.finish({"val_loss": np.float32(0.25), "steps": 2}, command)
    shown = capsys.readouterr().out
    assert command in shown and "val_loss" in shown and "0.25" in shown and str(config.run.dir)[:20] in shown
    before = tree(config.run.dir)
    config.parallel.tensor = 2  # this key may change, and still nothing is written
    with RunFolder.open(config, "sft", []) as run:
        assert run.finished
        run.say_finished()
    assert command in capsys.readouterr().out
    assert tree(config.run.dir) == before


def test_neither_torch_nor_megatron_is_imported():
    program = (
        "import sys, pctrain.run.folder, pctrain.hf.weight_files, pctrain.hf.chat_template, pctrain.compute.ledger; "
        "sys.exit(any(name in sys.modules for name in ('torch', 'megatron')))"
    )
    assert (
        subprocess.run(
            [sys.executable, "-c", program], env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
        ).returncode
        == 0
    )


# ---- found by fuzzing --------------------------------------------------------------------------------------------


def test_hostile_files_of_a_run_are_named(config, data):
    RunFolder.open(config, "sft", [data]).close()
    file = config.run.dir / "config.yaml"
    whole = file.read_text()
    for text, words in (
        ("kind: sft\nfingerprints: 3\n", "`fingerprints` must give"),
        ("kind: sft\nfingerprints: {a: 3}\n", "`fingerprints` must give"),
        ("kind: !!int x\n", "not valid YAML"),
        ('kind: "\\ud800"\n', "half of a surrogate pair"),
        ("kind: &a [*a]\n", "an alias names what contains it"),
    ):
        file.write_text(text)
        with pytest.raises(UserError, match=words):
            RunFolder.open(config, "sft", [data])
    file.write_text(whole.replace("seed: 0", "seed: x"))
    with pytest.raises(UserError, match=r"config.yaml: run.seed: "):
        read_config(config.run.dir)
    file.write_text(whole)
    with RunFolder.open(config, "sft", [data]) as run:
        (run.path / "metrics.jsonl").write_bytes(b'{"step": 1}\n{"step": 1e999}\n')
        with pytest.raises(UserError, match=r"metrics.jsonl:2: expected a JSON object with `step`"):
            run.rewind(1)
        (run.path / "metrics.jsonl").write_text("")
        (run.path / "rollouts").mkdir()
        (run.path / "rollouts" / "step-x.jsonl").touch()  # a file that the run did not write is left alone
        (run.path / "train.log").write_text(f"t step {'9' * 5000} loss\n")
        run.rewind(1)
        assert (run.path / "rollouts" / "step-x.jsonl").exists()
        (run.path / "metrics.jsonl").write_bytes(b"\xff\n")
        with pytest.raises(UserError, match=r"metrics.jsonl: not UTF-8 at byte 1"):
            run.rewind(1)
        (run.path / "metrics.jsonl").write_text('{"step": 1, "kind": "val", "val_loss": "low"}\n')
        with pytest.raises(UserError, match=r"metrics.jsonl:1: `val_loss` must be a number, found 'low'"):
            best_step(run.path, "sft")
        (run.path / "summary.json").write_text('{"summary": []}')
        with pytest.raises(UserError, match=r"summary.json is not the summary of a run"):
            run.say_finished()
