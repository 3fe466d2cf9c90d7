"""The run folder: everything a run writes, kept whole across SIGKILL and resume. docs/contracts.md lists the files.

Only rank 0 writes; the other ranks hold the same object, whose writing methods do nothing. The order that makes a resumed run
equal an uninterrupted one: record everything of step N, then commit the checkpoint of step N. On resume:

    with RunFolder.open(config, "sft", data_files, rank) as run:      # rank 0 first, then a barrier
        checkpoint = run.latest_checkpoint()                          # None: from the start
        run.rewind(step_of(checkpoint) if checkpoint else None)       # cuts what lies beyond it

Neither torch nor megatron-core is imported here, so a study or a report can read run folders without them.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import weakref
from collections.abc import Callable, Iterable, Mapping
from datetime import datetime
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import ValidationError

from pctrain.common.errors import UserError
from pctrain.common.progress import make_console
from pctrain.config.load import dump
from pctrain.config.tree import Config
from pctrain.data.sources import content_hash
from pctrain.distributed.health import watchdog
from pctrain.files import yaml_text
from pctrain.files.durable import cut_torn_line, fsync, json_line, plain, rewrite_lines, write_beside
from pctrain.files.lock import lock_folder
from pctrain.run import checkpoints, tracking
from pctrain.run.tracking import Trackers

Kind = Literal["sft", "rl"]

# What may differ between the starts of one run: where it and its inputs lie (what is in the inputs is compared, by fingerprint), how it
# is spread over ranks and how its helpers are sized.
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
# What may lie in a folder before it becomes a run folder: inputs made for this very run, and the traces of a start killed at once.
TO_BE_CONTINUED = (
    "to-be-continued"  # an empty file in run.dir of a command that was asked to stop, until it is started again
)
_BEFORE_OPEN = {
    "data",
    "model",
    "tokens",
    "start.json",
    ".lock",
    ".prepare.lock",
    "config.yaml.tmp",
    watchdog.FOLDER,
    TO_BE_CONTINUED,
}
HF_FOLDER = "hf"  # the final weights
_LOG_STEP = re.compile(r"^\S+ step\s+(\d{1,18})\b")


class RunFolder:
    """One run's folder. Make it with `RunFolder.open`; it is a context manager, and `close()` releases the lock."""

    def __init__(self, path: Path, config: Config, kind: Kind, writes: bool) -> None:
        self.path = path
        self.config = config
        self.kind: Kind = kind
        self.writes = writes
        self._fingerprints: dict[str, str] = {}  # of the data files; rank 0 has them
        self._appenders: dict[str, int] = {}  # file name -> descriptor opened with O_APPEND
        self._trackers: Trackers | None = None
        self._purge_step: int | None = None
        self._release: Callable[[], Any] | None = None

    # ---- opening and closing ---------------------------------------------------------------------------------------

    @classmethod
    def open(
        cls,
        config: Config,
        kind: Kind,
        data_files: Iterable[Path],
        digests: Mapping[str, str] | None = None,
        rank: int = 0,
    ) -> RunFolder:
        """Create `config.run.dir`, or open it where it already belongs to this config. Rank 0 checks, locks and writes.

        `digests`: fingerprints of further inputs that are known already, by path.

        Errors (UserError): another process runs in the folder; the folder holds something else, another kind of run or another
        config (every differing key is listed); a data file is missing or has changed. In each case nothing has been written.
        """
        path = Path(config.run.dir)
        run = cls(path, config, kind, writes=rank == 0)
        if not run.writes:
            return run
        _refuse_foreign_folder(path)
        tracking.check(config)
        run._fingerprints = fingerprints = {str(file): content_hash(file) for file in data_files} | dict(digests or {})
        try:
            path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(
                f"run.dir {path}: cannot be created ({error.strerror}); set run.dir to a folder you may write to"
            ) from None
        run._release = weakref.finalize(run, lock_folder(path / ".lock"))
        try:
            if (path / "config.yaml").exists():
                run._resume(fingerprints)
            else:
                write_beside(path / "config.yaml", _config_text(config, kind, fingerprints))
        except BaseException:
            run.close()
            raise
        return run

    def _resume(self, fingerprints: dict[str, str]) -> None:
        """Refuse another config, kind or data. Then mend what a kill left; nothing is touched in a finished run.

        Where only free keys changed, config.yaml is rewritten: it says what the newest start ran with.
        """
        changed = self._changed_keys(fingerprints)
        if self.finished:
            return
        self._sweep()
        if changed:
            write_beside(self.path / "config.yaml", _config_text(self.config, self.kind, fingerprints))
            self.log("resumed with " + ", ".join(f"{key} {old} -> {new}" for key, (old, new) in changed.items()))

    def _changed_keys(self, fingerprints: dict[str, str]) -> dict[str, tuple[Any, Any]]:
        """{dotted key: (value in config.yaml, value now)}, free keys only; any other difference is a UserError."""
        file = self.path / "config.yaml"
        old = _read_config_file(file)
        if old.get("kind") != self.kind:
            raise UserError(f"{self.path} holds a run of kind {old.get('kind')}, not {self.kind}; set another run.dir")
        _refuse_changed_data(file, old["fingerprints"], fingerprints)
        before = _flatten({key: value for key, value in old.items() if key not in ("kind", "fingerprints")})
        now = _flatten(self.config.model_dump(mode="json"))
        changed = {
            key: (before.get(key, "(absent)"), now.get(key, "(absent)"))
            for key in sorted(before.keys() | now.keys())
            if before.get(key, "(absent)") != now.get(key, "(absent)")
        }
        refused = {key: pair for key, pair in changed.items() if not _is_free(key)}
        if refused:
            lines = "\n".join(f"  {key}: {old_value} -> {new_value}" for key, (old_value, new_value) in refused.items())
            raise UserError(
                f"{self.path} belongs to another config; these keys differ (in {file} -> now):\n{lines}\n"
                f"Set another run.dir, or put the old values back, or delete {self.path} to begin anew."
            )
        return changed

    def _sweep(self) -> None:
        """Remove what a killed process left half done: temporary files and folders, and torn last lines."""
        for leftover in [
            *self.path.glob("*.tmp"),
            *self.path.glob("checkpoints/*.tmp"),
            *self.path.glob("rollouts/*.tmp"),
        ]:
            checkpoints.remove_folder(leftover) if leftover.is_dir() else leftover.unlink()
        for name in ("metrics.jsonl", "ledger.jsonl", "train.log"):
            cut_torn_line(self.path / name)

    def close(self) -> None:
        """Close the files and release the lock. Called again, it does nothing."""
        for descriptor in self._appenders.values():
            os.close(descriptor)
        self._appenders.clear()
        if self._trackers is not None:
            self._trackers.close()
            self._trackers = None
        if self._release is not None:
            self._release()

    def __enter__(self) -> RunFolder:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # ---- recording -------------------------------------------------------------------------------------------------

    def record(self, step: int, kind: Literal["train", "val", "eval"], values: Mapping[str, Any]) -> None:
        """Append one line to metrics.jsonl and the same numbers to TensorBoard (and W&B) as `<kind>/<key>`.

        `values` holds `eflops_sft`, `eflops_rl` and the metric keys of docs/contracts.md; numbers, NumPy or torch scalars, or words.
        NaN and infinities are written as null.
        """
        if kind not in ("train", "val", "eval"):
            raise ValueError(f"kind {kind!r}: expected train, val or eval")
        if not self.writes:
            return
        numbers = {key: plain(value) for key, value in values.items()}
        first = {key: numbers[key] for key in ("eflops_sft", "eflops_rl") if key in numbers}
        self._append("metrics.jsonl", json_line({"step": step, "kind": kind, **first, **numbers}))
        if self._trackers is None:
            self._trackers = Trackers(self.path, self.config, self._purge_step)
        self._trackers.write(step, kind, numbers)

    def record_ledger(self, entries: Iterable[Any]) -> None:
        """Append entries (mappings or dataclasses with the fields of docs/contracts.md) to ledger.jsonl, one a line."""
        if self.writes:
            self._append("ledger.jsonl", "".join(json_line(plain(entry)) for entry in entries))

    def write_rollouts(self, step: int, rows: Iterable[Mapping[str, Any]]) -> None:
        """Write rollouts/step-N.jsonl: prompt, response, answer, reward, cause, finish, kept, why of every sample of that step."""
        if self.writes:
            write_beside(self.path / "rollouts" / f"step-{step}.jsonl", "".join(json_line(plain(row)) for row in rows))

    def log(self, line: str) -> None:
        """Append a line to train.log, behind the time of day. A line about a step begins with `step N`: `rewind` cuts by that."""
        if self.writes:
            self._append("train.log", f"{datetime.now().isoformat(timespec='seconds')} {line}\n")

    def say(self, line: str) -> None:
        """`log`, and print it."""
        self.log(line)
        if self.writes:
            make_console().print(line, markup=False, highlight=False)

    def _append(self, name: str, text: str) -> None:
        """One write() to a descriptor in append mode: a killed process can tear the last line, never an earlier one."""
        if name not in self._appenders:
            self._appenders[name] = os.open(self.path / name, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        data = text.encode()
        while data:
            data = data[os.write(self._appenders[name], data) :]

    # ---- checkpoints -----------------------------------------------------------------------------------------------

    def checkpoint_path(self, step: int) -> Path:
        """Where the complete checkpoint of `step` lies, or will lie."""
        return self.path / "checkpoints" / f"step-{step}"

    def begin_checkpoint(self, step: int) -> Path:
        """A new empty folder to write a checkpoint into. For rank 0 alone; the others are told its name."""
        return checkpoints.begin(self.checkpoint_path(step))

    def commit_checkpoint(self, tmp_dir: Path, step: int, about: Mapping[str, Any]) -> Path:
        """Complete the checkpoint and give it its final name, then delete what `run.keep_last` and `run.keep_every` do not keep.

        For rank 0, when every rank has finished writing. `about` (layout, ledger, versions) goes into manifest.json with the hash of the
        config and the fingerprints of the data. A kill at any moment leaves the old state or the new one.
        """
        if self._trackers is not None:
            self._trackers.flush()
        for name in (
            self._appenders
        ):  # what the checkpoint counts as recorded must not be younger on the disk than the checkpoint
            fsync(self.path / name)
        final = self.checkpoint_path(step)
        run = {"kind": self.kind, "config_sha256": config_hash(self.config), "fingerprints": self._fingerprints}
        checkpoints.commit(Path(tmp_dir), final, {**run, **about})
        keep = self.config.run
        if dropped := checkpoints.retire(self.path, keep.keep_last, keep.keep_every, best_step(self.path, self.kind)):
            self.log(
                f"checkpoints deleted (run.keep_last={keep.keep_last}, run.keep_every={keep.keep_every}): steps {dropped}"
            )
        return final

    def latest_checkpoint(self) -> Path | None:
        """The newest checkpoint, its files all there with their sizes; None where there is none. A UserError names what is wrong.

        `resume` proves the contents before it loads: that reads every byte, and is shared out over the ranks.
        """
        return checkpoints.newest(self.path)

    def rewind(self, step: int | None) -> None:
        """Cut metrics.jsonl, ledger.jsonl, train.log and rollouts/ back to `step` (None: to nothing), and TensorBoard's curves too."""
        if not self.writes:
            return
        last = -1 if step is None else step
        for name, descriptor in self._appenders.items():
            os.close(descriptor)  # the files are about to be replaced
        self._appenders.clear()
        for name in ("metrics.jsonl", "ledger.jsonl"):
            rewrite_lines(
                self.path / name,
                lambda lines, file: [
                    line for number, line in enumerate(lines, 1) if _step_of_line(line, file, number) <= last
                ],
            )
        rewrite_lines(self.path / "train.log", lambda lines, _: _log_until(lines, last))
        for rollouts in self.path.glob("rollouts/step-*.jsonl"):
            step = rollouts.stem.removeprefix("step-")
            if step.isdecimal() and int(step) > last:  # what has another name is not the run's
                rollouts.unlink()
        self._purge_step = last + 1

    # ---- start and end ---------------------------------------------------------------------------------------------

    def write_start(self, values: Mapping[str, Any]) -> None:
        """Write start.json of an RL run: start_step, role, sft_run, eflops_sft."""
        if self.writes:
            write_beside(self.path / "start.json", json.dumps(plain(values), indent=1) + "\n")

    @property
    def finished(self) -> bool:
        """Whether the run has ended: a second start says so (`say_finished`) and changes nothing."""
        return (self.path / "summary.json").exists()

    def finish(self, summary: Mapping[str, Any], next_command: str) -> None:
        """Write summary.json, print the closing summary with the next command, and close the folder."""
        if self.writes:
            values = {"summary": plain(summary), "next_command": next_command}
            write_beside(self.path / "summary.json", json.dumps(values, indent=1) + "\n")
            _print_summary(f"{self.kind} run finished", self.path, values["summary"], next_command)
        self.close()

    def say_finished(self) -> None:
        """Print the closing summary of a run that had ended before this start."""
        if self.writes:
            values = _read_summary(self.path / "summary.json")
            title = f"{self.kind} run had finished before; nothing was changed"
            _print_summary(title, self.path, values["summary"], values["next_command"])


# ---- reading run folders -----------------------------------------------------------------------------------------------


def read_config(folder: Path) -> tuple[Config, Kind, dict[str, str]]:
    """(config, kind, sha256 by data file) of a run folder. UserError where it is none."""
    file = Path(folder) / "config.yaml"
    old = _read_config_file(file)
    kind, fingerprints = old.pop("kind"), old.pop("fingerprints")
    try:
        return Config.model_validate(old), kind, fingerprints
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        raise UserError(
            f"{file}: {'.'.join(map(str, first['loc']))}: {first['msg']}; the config of a run is written whole"
        ) from None


def best_step(folder: Path, kind: Kind) -> int | None:
    """Step of the checkpoint with the lowest validation loss (SFT) or the highest score (RL), the first of equals; None: not measured."""
    steps = {checkpoints.checkpoint_step(path) for path in checkpoints.list_checkpoints(folder)}
    losses = {step: value for step, value in read_values(folder, "val", "val_loss").items() if step in steps}
    scores = {step: value for step, value in read_values(folder, "eval", "score").items() if step in steps}
    if kind == "sft":
        return min(losses, key=lambda step: (losses[step], step), default=None)
    return max(scores, key=lambda step: (scores[step], -step), default=None)


def read_values(folder: Path, kind: str, key: str) -> dict[int, float]:
    """{step: value} of one metric of a run folder."""
    file = Path(folder) / "metrics.jsonl"
    lines = _read_lines(file) if file.exists() else []
    found = {line["step"]: line[key] for line in lines if line.get("kind") == kind and line.get(key) is not None}
    for value in [*found, *found.values()]:
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise UserError(f"{file}: `step` and `{key}` must be numbers, found {value!r:.60}; mend or delete the line")
    return found


def _read_lines(file: Path) -> list[dict[str, Any]]:
    lines = []
    try:
        text = file.read_bytes()
    except OSError as error:
        raise UserError(
            f"{file}: cannot be read ({error.strerror}); put the file back, or set another run.dir"
        ) from None
    for number, line in enumerate(text.splitlines(), start=1):
        try:
            lines.append(json.loads(line))
            lines[-1]["step"].__hash__()
        except (ValueError, RecursionError, KeyError, TypeError, AttributeError):
            raise UserError(
                f"{file}, line {number}: expected a JSON object with `step`; "
                f"mend or delete the line, or set another run.dir"
            ) from None
    return lines


# ---- checks ------------------------------------------------------------------------------------------------------------


def _refuse_foreign_folder(path: Path) -> None:
    """Raise unless `path` is free, or a run folder, or holds only what is made for a run before it starts."""
    if not path.exists():
        return
    if not path.is_dir():
        raise UserError(f"run.dir {path} is a file; set run.dir to a folder")
    names = {entry.name for entry in path.iterdir()}
    if "config.yaml" not in names and names - _BEFORE_OPEN:
        found = ", ".join(sorted(names - _BEFORE_OPEN)[:5])
        raise UserError(
            f"run.dir {path} is no run folder and not empty (it holds {found}); set run.dir to a new folder"
        )


def _refuse_changed_data(file: Path, before: dict[str, str], now: dict[str, str]) -> None:
    """Files are matched by path; a file of another path by its name, so that a folder that was moved goes on."""
    by_name = {Path(name).name: digest for name, digest in before.items()}
    for name, digest in now.items():
        old = before.get(name, by_name.get(Path(name).name))
        if old is None:
            raise UserError(f"input file {name} is not among those this run began with ({file}); set another run.dir")
        if old != digest:
            raise UserError(
                f"input file {name} has changed since this run began (sha256 {old[:12]}… in {file}, now {digest[:12]}…); "
                f"put the old file back, or set another run.dir"
            )


def _read_config_file(file: Path) -> dict[str, Any]:
    try:
        tree = yaml_text.parse(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{file} is missing: {file.parent} is no run folder") from None
    except (yaml.YAMLError, UnicodeDecodeError, OSError) as error:
        raise UserError(
            f"{file} is not valid YAML ({str(error).splitlines()[0]}); "
            f"this folder cannot be resumed: set another run.dir"
        ) from None
    if not isinstance(tree, dict) or "kind" not in tree:
        raise UserError(f"{file} is not the config of a run (no `kind`); set another run.dir")
    before = tree.get("fingerprints") or {}
    if not isinstance(before, dict) or not all(isinstance(text, str) for text in [*before, *before.values()]):
        raise UserError(
            f"{file}: `fingerprints` must give the sha256 of each input file by its path; set another run.dir"
        )
    return {**tree, "fingerprints": before}


def _read_summary(file: Path) -> dict[str, Any]:
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
        json.dumps(values, ensure_ascii=False).encode()
        values["summary"].items(), values["next_command"].strip()
    except (OSError, ValueError, RecursionError, KeyError, TypeError, AttributeError):
        raise UserError(
            f"{file} is not the summary of a run as it was written; delete it, and the same command writes it anew"
        ) from None
    return values


# ---- text -------------------------------------------------------------------------------------------------------------


def _config_text(config: Config, kind: Kind, fingerprints: dict[str, str]) -> str:
    return yaml.safe_dump({"kind": kind}) + dump(config) + yaml.safe_dump({"fingerprints": fingerprints})


def config_hash(config: Config) -> str:
    """sha256 of the resolved config without the keys that may change on resume: the same for all checkpoints of a run."""
    bound = {key: value for key, value in _flatten(config.model_dump(mode="json")).items() if not _is_free(key)}
    return hashlib.sha256(json.dumps(bound, sort_keys=True).encode()).hexdigest()


def _is_free(key: str) -> bool:
    """Whether a dotted key, or a section above it, may differ between the starts of one run; numbers stand for any item of a list."""
    parts = re.sub(r"\.\d+\b", "", key).split(".")
    return any(".".join(parts[:length]) in FREE_ON_RESUME for length in range(1, len(parts) + 1))


def _flatten(tree: Any, prefix: str = "") -> dict[str, Any]:
    """{"sft.optimizer.lr": 1e-5, "data.train.0.path": ..., ...}; lists of plain values are values."""
    if isinstance(tree, list) and tree and all(isinstance(item, dict) for item in tree):
        tree = dict(enumerate(tree))
    if not isinstance(tree, dict):
        return {prefix[:-1]: tree}
    return {key: value for name, branch in tree.items() for key, value in _flatten(branch, f"{prefix}{name}.").items()}


def _step_of_line(line: str, file: Path, number: int) -> int:
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError, RecursionError, OverflowError):
        raise UserError(
            f"{file}, line {number}: expected a JSON object with `step`; "
            f"mend or delete the line, or set another run.dir"
        ) from None


def _log_until(lines: list[str], last: int) -> list[str]:
    """The log up to the first line of a later step; lines without a step belong to what stands before them."""
    if last < 0:
        return []
    for index, line in enumerate(lines):
        match = _LOG_STEP.match(line)
        if match and int(match[1]) > last:
            return lines[:index]
    return lines


def _print_summary(title: str, path: Path, summary: Mapping[str, Any], next_command: str) -> None:
    from rich.table import Table
    from rich.text import Text

    console = make_console()
    table = Table(title=title, title_justify="left", show_header=False)
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    table.add_row("run folder", Text(str(path)))
    for key, value in summary.items():
        table.add_row(Text(key), Text(f"{value:.4g}" if isinstance(value, float) else str(value)))
    console.print(table)
    console.print("Next:", style="bold")
    console.print(
        f"  {next_command}", soft_wrap=True, markup=False
    )  # never broken over lines: it is there to be copied
