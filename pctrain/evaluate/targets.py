"""The models that `pctrain eval` is given: Hugging Face directories, run folders, checkpoints.

Torch is not imported: a wrong path is refused in milliseconds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from pctrain.common.errors import UserError
from pctrain.compute.ledger import Ledger
from pctrain.hf.config import HFConfig
from pctrain.hf.directory import is_hf_directory
from pctrain.run import checkpoints
from pctrain.run.checkpoint_state import read_state
from pctrain.run.config_file import has_config, read_config
from pctrain.run.names import CHECKPOINTS, HF_FOLDER


@dataclass(frozen=True)
class Target:
    """One model.

    `hf_dir` has the config, the tokenizer and, unless it is a checkpoint, the weights. `name` is its folder in --out. A
    checkpoint and a run's final weights also have `run`, `step`, `kind` ("" if it belongs to no run) and the EFLOPs so
    far.
    """

    name: str
    path: Path
    hf_dir: Path
    checkpoint: Path | None = None
    run: Path | None = None
    kind: Literal["sft", "rl", ""] = ""
    step: int | None = None
    eflops_sft: float | None = None
    eflops_rl: float | None = None


def find(paths: Sequence[str | Path], model_path: Path | None) -> list[Target]:
    """Return the models in the order given, each with its own name.

    Args:
        paths: Hugging Face directories, run folders, checkpoints.
        model_path: `model.path`, for checkpoints whose run's model is not available.
    Raises:
        UserError: a path is none of the three, a run has not finished, a checkpoint's model is not known, or a model is
            given twice.
    """
    targets = [_find(Path(path), model_path) for path in paths]
    weights = [(target.checkpoint or target.hf_dir).resolve() for target in targets]  # RUN and RUN/hf are the same ones
    for target, folder in zip(targets, weights, strict=True):
        if weights.count(folder) > 1:
            raise UserError(f"{target.path}: these weights are given more than once")
    names = _distinct_names(targets, longest=max((len(folder.parts) for folder in weights), default=1))
    return [replace(target, name=name) for target, name in zip(targets, names, strict=True)]


def _distinct_names(targets: Sequence[Target], longest: int) -> list[str]:
    """Return a name for each target, of as many path parts as distinct names take, up to `longest`."""
    depth = 1
    while len({_name(target, depth) for target in targets}) < len(targets) and depth < longest:
        depth += 1
    names = [_name(target, depth) for target in targets]
    for name in names:
        if names.count(name) > 1:
            raise UserError(
                f"two of the models would both be called {name}; rename a folder, or evaluate them in two calls"
            )
    return names


def _name(target: Target, depth: int) -> str:
    """Return the last `depth` parts: `Qwen2.5-7B`, `rl-step-420` (a run), `rl-step-420-step-10` (its checkpoint)."""
    parts = [part for part in target.path.resolve().parts if part != "/"]
    if target.checkpoint is not None:
        return "-".join([*[part for part in parts[:-1] if part != CHECKPOINTS][-depth:], parts[-1]])
    if parts[-1] == HF_FOLDER and len(parts) > 1:
        parts.pop()
    return "-".join(parts[-depth:])


def _find(path: Path, model_path: Path | None) -> Target:
    if is_hf_directory(path):
        return Target("", path, path)
    if has_config(path):
        return _run_target(path)
    if checkpoints.has_manifest(path):
        return _checkpoint_target(path, model_path)
    if not path.exists():
        raise UserError(
            f"{path}: no such folder; expected a Hugging Face directory, a run folder, or a checkpoint "
            "RUN/checkpoints/step-N"
        )
    raise UserError(
        f"{path}: neither a Hugging Face directory (config.json), nor a run folder (config.yaml), nor a checkpoint "
        f"({checkpoints.MANIFEST})"
    )


def _run_target(run: Path) -> Target:
    """Return the final weights of a run."""
    folder, saved = run / HF_FOLDER, checkpoints.list_checkpoints(run)
    if not is_hf_directory(folder):
        example = f", such as {saved[-1]}" if saved else ""
        raise UserError(
            f"{run}: the run has not finished, so it has no {HF_FOLDER}/; let it end, or name a checkpoint{example}"
        )
    target = Target("", run, folder)
    return _with_ledger(target, saved[-1]) if saved else target


def _checkpoint_target(path: Path, model_path: Path | None) -> Target:
    checkpoints.checkpoint_step(path)  # refuses another name
    run = path.parent.parent
    own = read_config(run)[0].model.path if has_config(run) else None
    # The run's own model takes precedence over model.path, which may come from a config written for another run.
    for hf_dir in (own, model_path):
        if hf_dir is not None and is_hf_directory(hf_dir):
            return _with_ledger(Target("", path, hf_dir, checkpoint=path), path)
    reason = f"{run} has no config.yaml that names its model"
    if own is not None:
        reason = f"the model of its run, {own}, is not there"
    advice = "give its Hugging Face directory by --model.path"
    if model_path is not None:
        advice = f"model.path = {model_path} has no config.json"
    raise UserError(f"{path}: {reason}; {advice}")


def _with_ledger(target: Target, checkpoint: Path) -> Target:
    """Return a target with what the checkpoint says about its run and its compute."""
    kind, state = checkpoints.read_manifest(checkpoint).get("kind"), read_state(checkpoint)
    ledger = Ledger(HFConfig.read(target.hf_dir).shape)
    ledger.load_state_dict(state["ledger"])
    run = checkpoint.parent.parent
    return replace(
        target,
        run=run if has_config(run) else None,
        kind=kind if kind in ("sft", "rl") else "",
        step=checkpoints.checkpoint_step(checkpoint),
        eflops_sft=ledger.eflops_sft,
        eflops_rl=ledger.eflops_rl,
    )
