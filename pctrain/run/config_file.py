"""`config.yaml` of a run folder: the resolved config of a run, its kind, and the fingerprints of its inputs.

A run resumes at the same config and inputs only. This module says what may differ, and refuses the rest.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import ValidationError

from pctrain.common.errors import UserError
from pctrain.config.load import dump
from pctrain.config.tree import Config
from pctrain.files import yaml_text
from pctrain.files.durable import write_atomically
from pctrain.run.names import CONFIG, HF_FOLDER

Kind = Literal["sft", "rl"]

# Keys that may change on resume: paths (the contents of inputs are compared, by fingerprint), the layout over ranks,
# and the sizes of helpers.
FREE_ON_RESUME = {
    "run.dir",
    "run.tensorboard",
    "run.wandb",
    "run.keep_last",
    "run.keep_every",
    "parallel",
    "reward.workers",
    "reward.timeout",
    "reward.memory_mb",
    "rollout.kv_cache_mb",
    "rollout.max_sequences",
    "rollout.gpu_memory",
    "rollout.verify_every",
    "data.train.path",
    "data.validation.path",
    "data.test",
    "data.rl",
    "data.cache",
    "data.workers",
    "model.path",
    "model.checkpoint",
    "eval.benchmarks",
    "eval.instruction",
    "eval.judge",
}
ABSENT = "(absent)"


def has_config(folder: Path) -> bool:
    """Return whether a folder is a run folder: it has a config.yaml."""
    return (folder / CONFIG).is_file()


def write_config(folder: Path, config: Config, kind: Kind, fingerprints: Mapping[str, str]) -> None:
    """Write config.yaml."""
    text = yaml.safe_dump({"kind": kind}) + dump(config) + yaml.safe_dump({"fingerprints": dict(fingerprints)})
    write_atomically(folder / CONFIG, text)


def read_config(folder: Path) -> tuple[Config, Kind, dict[str, str]]:
    """Return (config, kind, sha256 by data file) of a run folder.

    Raises:
        UserError: the folder is not a run folder, its config.yaml is damaged, or another version of pctrain wrote it.
    """
    tree = read_tree(folder)
    kind, fingerprints = tree.pop("kind"), tree.pop("fingerprints")
    return _validate(folder, tree), kind, fingerprints


def read_tree(folder: Path) -> dict[str, Any]:
    """Return config.yaml as plain values, with `kind` and `fingerprints`, from whatever version of pctrain.

    Raises:
        UserError: the folder is not a run folder, or its config.yaml is damaged.
    """
    file = Path(folder) / CONFIG
    try:
        tree = yaml_text.parse(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(
            f"{file}: missing. {file.parent} is not a run folder: every run writes its resolved config there. "
            "Name the folder of a run"
        ) from None
    except UnicodeDecodeError as error:
        raise UserError(f"{file}: cannot be read as text ({error}). {_ANOTHER}") from None
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error.strerror}). {_ANOTHER}") from None
    except yaml.YAMLError as error:
        raise UserError(f"{file} is not valid YAML ({str(error).splitlines()[0]}). {_ANOTHER}") from None
    if not isinstance(tree, dict) or tree.get("kind") not in ("sft", "rl"):
        raise UserError(
            f"{file} is not the config of a run: expected a tree with `kind: sft` or `kind: rl`. {_ANOTHER}"
        )
    fingerprints = tree.get("fingerprints") or {}
    texts = [*fingerprints, *fingerprints.values()] if isinstance(fingerprints, dict) else [None]
    if not all(isinstance(text, str) for text in texts):
        raise UserError(f"{file}: `fingerprints` must give the sha256 of each input file by its path. {_ANOTHER}")
    return {**tree, "fingerprints": fingerprints}


def read_text(folder: Path) -> str:
    """Return the text of config.yaml, for display. Call `read_tree` first: it raises for a file that cannot be read."""
    return (Path(folder) / CONFIG).read_text(encoding="utf-8")


def compare(folder: Path, config: Config, kind: Kind, fingerprints: Mapping[str, str]) -> dict[str, tuple[Any, Any]]:
    """Return {dotted key: (value in config.yaml, value now)} for the keys that changed, all of which may.

    Raises:
        UserError: the folder holds another kind of run, another version's run, or a run with another config (the
        message
            lists every differing key), or the content of an input file has changed.
    """
    file = Path(folder) / CONFIG
    tree = read_tree(folder)
    old_kind, old_fingerprints = tree.pop("kind"), tree.pop("fingerprints")
    if old_kind != kind:
        raise UserError(f"{folder} holds a run of kind {old_kind}, not {kind}. Set another run.dir")
    _validate(folder, tree)
    _refuse_changed_inputs(file, old_fingerprints, fingerprints)
    before, now = _flatten(tree), _flatten(config.model_dump(mode="json"))
    changed = {
        key: (before.get(key, ABSENT), now.get(key, ABSENT))
        for key in sorted(before.keys() | now.keys())
        if before.get(key, ABSENT) != now.get(key, ABSENT)
    }
    refused = {key: values for key, values in changed.items() if not _is_free(key)}
    if refused:
        lines = "\n".join(f"  {key}: {old} -> {new}" for key, (old, new) in refused.items())
        raise UserError(
            f"{folder} belongs to another config; these keys differ (in {file} -> now):\n{lines}\n"
            f"Set another run.dir, or put the old values back, or delete {folder} to start over."
        )
    return changed


def config_hash(config: Config) -> str:
    """Return the sha256 of a config without the keys that may change on resume: one for all checkpoints of a run."""
    bound = {key: value for key, value in _flatten(config.model_dump(mode="json")).items() if not _is_free(key)}
    return hashlib.sha256(json.dumps(bound, sort_keys=True).encode()).hexdigest()


_ANOTHER = "This folder cannot be resumed: set another run.dir"


def _validate(folder: Path, tree: dict[str, Any]) -> Config:
    """Return the config of a tree. Raises UserError if this version of pctrain could not have written it."""
    file = Path(folder) / CONFIG
    try:
        config = Config.model_validate(tree)
    except ValidationError as error:
        faults = error.errors(include_url=False, include_input=False)
        unknown = [_dotted(fault["loc"]) for fault in faults if fault["type"] == "extra_forbidden"]
        if unknown:
            raise _other_version(folder, f"has keys that this version does not know: {_some(unknown)}") from None
        raise UserError(
            f"{file}: {_dotted(faults[0]['loc'])}: {faults[0]['msg']}. Put the file back as it was, or set another "
            "run.dir"
        ) from None
    missing = _missing_keys(tree, config.model_dump(mode="json"))
    if missing:
        raise _other_version(folder, f"lacks keys that this version writes: {_some(missing)}")
    return config


def _other_version(folder: Path, reason: str) -> UserError:
    return UserError(
        f"{folder} is the run of another version of pctrain: its {CONFIG} {reason}. This version does not resume it. "
        "Finish the run with the version that began it, or set another run.dir to start over; its weights can start a "
        f"new run (--model.path={folder / HF_FOLDER}, once it has finished)"
    )


def _missing_keys(tree: Mapping[str, Any], whole: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Return the dotted keys of a whole config that a tree lacks."""
    missing = []
    for key, value in whole.items():
        if key not in tree:
            missing.append(f"{prefix}{key}")
        elif isinstance(value, dict) and isinstance(tree[key], dict):
            missing += _missing_keys(tree[key], value, f"{prefix}{key}.")
    return missing


def _dotted(location: tuple[int | str, ...]) -> str:
    return ".".join(map(str, location))


def _some(keys: list[str]) -> str:
    return ", ".join(keys[:5]) + (f" and {len(keys) - 5} more" if len(keys) > 5 else "")


def _refuse_changed_inputs(file: Path, before: Mapping[str, str], now: Mapping[str, str]) -> None:
    """Raise UserError for an input with other content.

    Files are matched by path, and a file at another path by its name, so that a folder that was moved resumes.
    """
    by_name = {Path(name).name: digest for name, digest in before.items()}
    for name, digest in now.items():
        old = before.get(name, by_name.get(Path(name).name))
        if old is None:
            raise UserError(f"input file {name} is not among those this run began with ({file}). Set another run.dir")
        if old != digest:
            raise UserError(
                f"input file {name} has changed since this run began (sha256 {old[:12]}… in {file}, now "
                f"{digest[:12]}…). Put the old file back, or set another run.dir"
            )


def _is_free(key: str) -> bool:
    """Return whether a dotted key, or a section above it, may change on resume. Numbers are items of a list."""
    parts = re.sub(r"\.\d+\b", "", key).split(".")
    return any(".".join(parts[:length]) in FREE_ON_RESUME for length in range(1, len(parts) + 1))


def _flatten(tree: Any, prefix: str = "") -> dict[str, Any]:
    """Return {"sft.optimizer.lr": 1e-5, "data.train.0.path": ..., ...}; lists of plain values are values."""
    if isinstance(tree, list) and tree and all(isinstance(item, dict) for item in tree):
        tree = dict(enumerate(tree))
    if not isinstance(tree, dict):
        return {prefix[:-1]: tree}
    return {key: value for name, branch in tree.items() for key, value in _flatten(branch, f"{prefix}{name}.").items()}
