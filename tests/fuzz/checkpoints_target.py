"""Files of runs and models: checkpoints, run folders, rollouts, token stores, Hugging Face directories."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from pctrain.cli import main as cli
from pctrain.common.errors import UserError
from pctrain.config.load import load, read
from pctrain.config.tree import ParallelConfig
from pctrain.run import checkpoints, config_file, records
from pctrain.run import folder as runfolder
from pctrain.run.checkpoint_state import read_state
from tests.fuzz import checkpoint_cases
from tests.fuzz.case import Case
from tests.fuzz.checkpoint_cases import BYTES, PARTS, RAN, STEP, TENSORS, VOCABULARY
from tests.fuzz.checkpoint_folders import RUN_OPTIONS, config, make, make_core

NAME = "checkpoints"
CASES = checkpoint_cases.CASES


def prepare(folder: Path) -> Mapping[str, Path]:
    import pctrain.core.session
    import pctrain.rl.loop
    import pctrain.sft.journal
    import pctrain.tools.show  # noqa: F401

    child = os.fork()  # process groups and their threads stay in it
    if child == 0:
        status = 1
        try:
            make(folder)
            status = 0
        finally:
            os._exit(status)
    assert os.waitpid(child, 0)[1] == 0, "the folders could not be made"
    bases = {name: folder / "bases" / name for name in ("run", "store", "model")}
    for base in bases.values():
        for path in base.rglob("*"):
            if path.is_file() and not path.is_relative_to(bases["run"] / "model"):
                BYTES[path.relative_to(base).as_posix()] = path.read_bytes()
    PARTS[:] = sorted(Path(name).name for name in BYTES if name.startswith(STEP) and not name.endswith(".json"))
    length = int.from_bytes(BYTES["model/model.safetensors"][:8], "little")
    header = json.loads(BYTES["model/model.safetensors"][8 : 8 + length])
    TENSORS[:] = [name for name in header if name != "__metadata__"]
    VOCABULARY[0] = json.loads(BYTES["model/config.json"])["vocab_size"]
    return bases


# ---- what is done with them
# ------------------------------------------------------------------------------------------------


def run(case: Case, folder: Path) -> None:
    try:
        {
            "load": _load,
            "state": _state,
            "open": _open,
            "show": _show,
            "replay": _replay,
            "store": _store,
            "model": _model,
        }[case.action](case, folder)
    finally:
        assert not (folder / RAN).exists(), "code of a file ran"


_loaded: Any = None  # one core a process: making it takes as long as a hundred loads


def _load(case: Case, folder: Path) -> None:
    from pctrain.core import session
    from pctrain.distributed import parallel

    global _loaded
    if _loaded is None:
        parallel.initialize(ParallelConfig(), 0)
        _loaded = make_core(folder / "model")
    path, (whole, gone) = folder / STEP, case.arguments
    if gone and (path / gone).is_file():
        (path / gone).unlink()
    if whole == "whole" and (path / "manifest.json").is_file():
        manifest = json.loads((path / "manifest.json").read_text())
        manifest["files"] = {
            file.relative_to(path).as_posix(): {
                "bytes": file.stat().st_size,
                "sha256": hashlib.sha256(file.read_bytes()).hexdigest(),
            }
            for file in path.rglob("*")
            if file.is_file() and file.name != "manifest.json"
        }
        (path / "manifest.json").write_text(json.dumps(manifest))
    newest = checkpoints.newest(folder / "run")
    session.verify(newest, checkpoints.damaged)
    session.verify(newest, checkpoints.damaged_start)
    _loaded.load(newest)


def _state(case: Case, folder: Path) -> None:
    from pctrain.ceiling.monitor import Monitor
    from pctrain.compute.ledger import Ledger
    from pctrain.core.skipped import SkippedUpdates
    from pctrain.hf.config import HFConfig
    from pctrain.rl.prompts import PromptStream
    from pctrain.rl.session import _switch_point
    from pctrain.sft.spikes import Spikes

    state = read_state(folder / STEP, "prompts")
    shape = HFConfig.read(folder / "model").shape
    ledger = Ledger(shape)
    ledger.load_state_dict(state["ledger"])
    ledger.add(3, "sft_update", [5, 6], 0.5)
    assert ledger.eflops_sft >= 0
    SkippedUpdates(3, state.get("skipped_in_a_row", 0))
    Spikes(state.get("recent_losses")).add(2.0)
    monitor = Monitor(0.02, 0.1)
    for validation in state.get("validations", []):
        monitor.add(*validation)
    stream = PromptStream(_problems(), 0)
    stream.load_state_dict(state["prompts"])
    stream.take(4)
    _switch_point(read(None, [*RUN_OPTIONS, f"--model.checkpoint={STEP}"]), "none")


def _open(case: Case, folder: Path) -> None:
    with runfolder.RunFolder.open(config(), "sft", [Path("a.jsonl")]) as opened:
        if opened.finished:
            opened.say_finished()
            return
        newest = opened.latest_checkpoint()
        opened.rewind(checkpoints.checkpoint_step(newest))
        records.best_step(opened.path, "sft")
        records.best_step(opened.path, "rl")
    config_file.read_config(Path("run"))


def _show(case: Case, folder: Path) -> None:
    if case.arguments:
        cli.run_command(["show", "run", *case.arguments])
    else:
        config_file.read_config(Path("run"))
        records.read_values(Path("run"), "val", "val_loss")
        load(Path("run/config.yaml"), [])


def _problems() -> list[Any]:
    from pctrain.data.problems import Problem

    return [Problem(f"p:{number}", number - 1, "1+1=", [5, 6], "2") for number in (1, 2, 3)]


def _replay(case: Case, folder: Path) -> None:
    from pctrain.rl import replay
    from pctrain.rl.prompts import PromptStream

    step, sampled, state = replay.load(Path("step.npz"), _problems())
    stream = PromptStream(_problems(), 0)
    stream.load_state_dict(state)
    stream.take(4)
    for group in sampled.groups:
        assert len(group.completions) == len(group.verdicts) == len(group.prefixes), "a group of unequal lists"
        assert all(isinstance(token, int) for completion in group.completions for token in completion.token_ids)
    assert isinstance(step, int) and sampled.rollout_seconds >= 0


def _store(case: Case, folder: Path) -> None:
    from pctrain.data.store import TokenStore

    store = TokenStore(Path("tokens"))
    for i in range(min(len(store), 100)):
        row = store[i]
        assert len(row) == store.lengths[i] and row.weights.sum() == store.loss_tokens[i], (
            "a row that is not as long as the index says"
        )
        assert isinstance(store.id(i), str)
    sum(store.counts.values())
    assert store.tokens >= 0


def _model(case: Case, folder: Path) -> None:
    from pctrain.hf import chat_template
    from pctrain.hf.config import HFConfig
    from pctrain.hf.tokenizer import Tokenizer
    from pctrain.hf.weight_files import HFReader

    steps: list[Callable[[], object]] = [
        lambda: load(None, ["--model.path=model"], sections=("model", "parallel", "rollout")),
        lambda: HFConfig.read(Path("model")).shape,
        lambda: Tokenizer(Path("model")).encode("1+1="),
        lambda: chat_template.load(Path("model"), "auto"),
        lambda: _tensors(HFReader),
    ]
    refused = None
    for step in steps:  # each reader looks at the directory for itself
        try:
            step()
        except UserError as error:
            refused = error
    if refused is not None:
        raise refused


def _tensors(reader_class: Any) -> None:
    with reader_class(Path("model")) as reader:
        expected = {name: reader.shape(name) for name in list(reader.files)[:50]}
        reader.check(expected, "LlamaForCausalLM")
        for name, shape in expected.items():
            if shape:
                reader.read(name, slice(0, 2))
