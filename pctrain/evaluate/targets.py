"""What `pctrain eval` is given: Hugging Face directories, run folders, checkpoints. No torch: a wrong path is refused in milliseconds."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from pctrain.common.errors import UserError
from pctrain.compute.ledger import Ledger
from pctrain.hf.config import HFConfig
from pctrain.hf.directory import is_hf_directory
from pctrain.run import checkpoints
from pctrain.run.folder import HF_FOLDER, read_config


@dataclass(frozen=True)
class Target:
    """One model. `hf_dir`: config, tokenizer and, unless it is a checkpoint, the weights; `name`: its folder in --out.

    Of a checkpoint, and of a run's final weights: `run`, `step`, `kind` (sft, rl; "" where it belongs to no run) and the EFLOPs so far.
    """

    name: str
    path: Path
    hf_dir: Path
    checkpoint: Path | None = None
    run: Path | None = None
    kind: str = ""
    step: int | None = None
    eflops_sft: float | None = None
    eflops_rl: float | None = None


def find(paths: Sequence[str | Path], model_path: Path | None) -> list[Target]:
    """The models in the order given, each with a name of its own. `model_path`: model.path, for checkpoints whose run's model is not there.

    Raises:
        UserError: a path that is none of the three, a run that has not finished, a checkpoint whose model is not known; one model twice.
    """
    targets = [_find(Path(path), model_path) for path in paths]
    weights = [(target.checkpoint or target.hf_dir).resolve() for target in targets]  # RUN and RUN/hf are the same ones
    for target, folder in zip(targets, weights, strict=True):
        if weights.count(folder) > 1:
            raise UserError(f"{target.path}: these weights are given more than once")
    depth, longest = 1, max((len(folder.parts) for folder in weights), default=1)
    while len({_name(target, depth) for target in targets}) < len(targets) and depth < longest:
        depth += 1
    names = [_name(target, depth) for target in targets]
    for name in names:
        if names.count(name) > 1:
            raise UserError(
                f"two of the models would both be called {name}; rename a folder, or evaluate them in two calls"
            )
    return [replace(target, name=name) for target, name in zip(targets, names, strict=True)]


def _find(path: Path, model_path: Path | None) -> Target:
    if is_hf_directory(path):
        return Target("", path, path)
    if (path / "config.yaml").is_file():
        return _of_run(path)
    if (path / checkpoints.MANIFEST).is_file():
        return _of_checkpoint(path, model_path)
    if not path.exists():
        raise UserError(
            f"{path}: no such folder; expected a Hugging Face directory, a run folder, or a checkpoint RUN/checkpoints/step-N"
        )
    raise UserError(
        f"{path}: neither a Hugging Face directory (config.json), nor a run folder (config.yaml), nor a checkpoint "
        f"({checkpoints.MANIFEST})"
    )


def _of_run(run: Path) -> Target:
    folder, found = run / HF_FOLDER, checkpoints.list_checkpoints(run)
    if not is_hf_directory(folder):
        such = f", such as {found[-1]}" if found else ""
        raise UserError(
            f"{run}: the run has not finished, so it has no {HF_FOLDER}/; let it end, or name a checkpoint{such}"
        )
    target = Target("", run, folder)
    return _with_ledger(target, found[-1]) if found else target


def _of_checkpoint(path: Path, model_path: Path | None) -> Target:
    checkpoints.checkpoint_step(path)  # refuses another name
    own = _own_model(path.parent.parent)
    # The run knows better than a config that was written for another one.
    for hf_dir in (own, model_path):
        if hf_dir is not None and is_hf_directory(hf_dir):
            return _with_ledger(Target("", path, hf_dir, checkpoint=path), path)
    why = (
        f"{path.parent.parent} has no config.yaml that names its model"
        if own is None
        else f"the model of its run, {own}, is not there"
    )
    given = (
        f"model.path = {model_path} has no config.json"
        if model_path is not None
        else "give its Hugging Face directory by --model.path"
    )
    raise UserError(f"{path}: {why}; {given}")


def _own_model(run: Path) -> Path | None:
    return read_config(run)[0].model.path if (run / "config.yaml").is_file() else None


def _with_ledger(target: Target, checkpoint: Path) -> Target:
    """With what the checkpoint says of its run and its compute."""
    try:
        kind = checkpoints.read_manifest(checkpoint).get("kind", "")
        state = json.loads((checkpoint / "state.json").read_text(encoding="utf-8"))["ledger"]
        ledger = Ledger(HFConfig.read(target.hf_dir).shape)
        ledger.load_state_dict(state)
    except FileNotFoundError as error:
        raise UserError(
            f"checkpoint {checkpoint}: {error.filename} is missing; copy it again, or name another"
        ) from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"checkpoint {checkpoint}: manifest.json or state.json is damaged ({error}); copy it again, or name another"
        ) from None
    run = checkpoint.parent.parent
    return replace(
        target,
        run=run if (run / "config.yaml").is_file() else None,
        kind=kind if kind in ("sft", "rl") else "",
        step=checkpoints.checkpoint_step(checkpoint),
        eflops_sft=ledger.eflops_sft,
        eflops_rl=ledger.eflops_rl,
    )


def _name(target: Target, depth: int) -> str:
    """Its last parts, as many as it takes: `Qwen2.5-7B`, `rl-step-420` (a run), `rl-step-420-step-10` (a checkpoint of it)."""
    parts = [part for part in target.path.resolve().parts if part != "/"]
    if target.checkpoint is not None:
        return "-".join([*[part for part in parts[:-1] if part != "checkpoints"][-depth:], parts[-1]])
    if parts[-1] == HF_FOLDER and len(parts) > 1:
        parts.pop()
    return "-".join(parts[-depth:])
