"""The run folder: everything a run writes, kept consistent across SIGKILL and resume.

docs/reference/run_folder.md lists the files.

Only rank 0 writes. The other ranks hold the same object, whose writing methods do nothing. A resumed run equals an
uninterrupted one because of the order: record everything of step N, then commit the checkpoint of step N. On resume:

    with RunFolder.open(config, "sft", data_files, rank=rank) as run:  # rank 0 first, then a barrier
        checkpoint = run.latest_checkpoint()                           # None: from the start
        run.rewind(step_of(checkpoint) if checkpoint else None)        # cuts everything after it

Neither torch nor megatron-core is imported here, so a study or a report can read run folders without them.
"""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable, Iterable, Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

from pctrain.common.errors import UserError
from pctrain.common.progress import make_console
from pctrain.config.tree import Config, RunConfig
from pctrain.distributed.health import watchdog
from pctrain.files.durable import cut_torn_line, fingerprint, fsync, json_line, plain, write_atomically
from pctrain.files.lock import lock_folder
from pctrain.run import checkpoints, config_file, documents, records, tracking
from pctrain.run.config_file import Kind, config_hash
from pctrain.run.names import CHECKPOINTS, CONFIG, LEDGER, LOG, METRICS, ROLLOUTS, START, TO_BE_CONTINUED
from pctrain.run.tracking import Trackers

_LOCK = ".lock"
# What a folder may hold before it becomes a run folder: inputs made for this very run, and traces of a start killed at
# once.
_BEFORE_OPEN = {
    "data",
    "model",
    "tokens",
    START,
    _LOCK,
    ".prepare.lock",
    f"{CONFIG}.tmp",
    watchdog.FOLDER,
    TO_BE_CONTINUED,
}


class RunFolder:
    """One run's folder. Make it with `RunFolder.open`. It is a context manager; `close()` releases the lock.

    path: the folder. kind: sft or rl. writes: whether this is rank 0. layout: the `parallel` section of this start.
    """

    def __init__(self, config: Config, kind: Kind, writes: bool) -> None:
        """Hold a folder without touching it; `open` does the rest."""
        self.path = Path(config.run.dir)
        self.kind: Kind = kind
        self.writes = writes
        self.layout: dict[str, Any] = config.parallel.model_dump(exclude={"timeout"})
        self._settings: RunConfig = config.run
        self._whole_config: dict[str, Any] = config.model_dump(mode="json")  # for W&B
        self._identity: dict[str, Any] = {"kind": kind, "config_sha256": config_hash(config), "fingerprints": {}}
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
        fingerprint_of: Callable[[Path], str] = fingerprint,
    ) -> RunFolder:
        """Create `config.run.dir`, or open it if it already belongs to this config. Rank 0 checks, locks and writes.

        Args:
            config: the resolved config of the run.
            kind: sft or rl.
            data_files: the inputs that the run is bound to.
            digests: fingerprints of further inputs that are known already, by path.
            rank: this process; only rank 0 writes.
            fingerprint_of: returns the sha256 of one of `data_files`.
        Raises:
            UserError: another process runs in the folder; the folder holds something else, another kind of run or
            another
                config (every differing key is listed); a data file is missing or has changed. Nothing has been written.
        """
        run = cls(config, kind, writes=rank == 0)
        if not run.writes:
            return run
        _refuse_foreign_folder(run.path)
        tracking.check(config.run)
        fingerprints = {str(file): fingerprint_of(file) for file in data_files} | dict(digests or {})
        run._identity["fingerprints"] = fingerprints
        try:
            run.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(
                f"run.dir {run.path}: cannot be created ({error.strerror}); set run.dir to a folder you may write to"
            ) from None
        run._release = weakref.finalize(run, lock_folder(run.path / _LOCK))
        try:
            if config_file.has_config(run.path):
                run._resume(config, fingerprints)
            else:
                config_file.write_config(run.path, config, kind, fingerprints)
        except BaseException:
            run.close()
            raise
        return run

    def _resume(self, config: Config, fingerprints: Mapping[str, str]) -> None:
        """Refuse another config, kind or data. Then remove what a kill left. A finished run is not touched.

        If only free keys changed, config.yaml is rewritten: it holds the config of the newest start.
        """
        changed = config_file.compare(self.path, config, self.kind, fingerprints)
        if self.finished:
            return
        self._remove_leftovers()
        if changed:
            config_file.write_config(self.path, config, self.kind, fingerprints)
            self.log("resumed with " + ", ".join(f"{key} {old} -> {new}" for key, (old, new) in changed.items()))

    def _remove_leftovers(self) -> None:
        """Remove what a killed process left half done: temporary files and folders, and torn last lines."""
        for pattern in ("*.tmp", f"{CHECKPOINTS}/*.tmp", f"{ROLLOUTS}/*.tmp"):
            for leftover in self.path.glob(pattern):
                if leftover.is_dir():
                    checkpoints.remove_folder(leftover)
                else:
                    leftover.unlink()
        for name in (METRICS, LEDGER, LOG):
            cut_torn_line(self.path / name)

    def close(self) -> None:
        """Close the files and release the lock. A second call does nothing."""
        self._close_appenders()
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

    def record(self, step: int, kind: str, values: Mapping[str, Any]) -> None:
        """Append one line to metrics.jsonl, and the same numbers to TensorBoard (and W&B) as `<kind>/<key>`.

        Args:
            step: the training step.
            kind: train, val or eval.
            values: `eflops_sft`, `eflops_rl` and the metric keys of docs/reference/run_folder.md; numbers,
                NumPy or torch scalars, or texts. NaN and infinities are written as null.
        """
        if kind not in records.KINDS:
            raise ValueError(f"kind {kind!r}: expected train, val or eval")
        if not self.writes:
            return
        numbers = {key: plain(value) for key, value in values.items()}
        first = {key: numbers[key] for key in ("eflops_sft", "eflops_rl") if key in numbers}
        self._append(METRICS, json_line({"step": step, "kind": kind, **first, **numbers}))
        if self._trackers is None:
            self._trackers = Trackers(self.path, self._settings, self._whole_config, self._purge_step)
        self._trackers.write(step, kind, numbers)

    def record_ledger(self, entries: Iterable[Any]) -> None:
        """Append entries to ledger.jsonl, one a line: mappings or dataclasses (docs/reference/run_folder.md)."""
        if self.writes:
            self._append(LEDGER, "".join(json_line(plain(entry)) for entry in entries))

    def write_rollouts(self, step: int, rows: Iterable[Mapping[str, Any]]) -> None:
        """Write rollouts/step-N.jsonl: prompt, response, answer, reward, cause, finish, kept, why of every sample."""
        if self.writes:
            text = "".join(json_line(plain(row)) for row in rows)
            write_atomically(self.path / ROLLOUTS / f"step-{step}.jsonl", text)

    def log(self, line: str) -> None:
        """Append a line to train.log, after the time of day.

        A line about a step begins with `step N`: `rewind` cuts the log by that.
        """
        if self.writes:
            self._append(LOG, f"{datetime.now().isoformat(timespec='seconds')} {line}\n")

    def say(self, line: str) -> None:
        """Log a line, and print it."""
        self.log(line)
        if self.writes:
            make_console().print(line, markup=False, highlight=False)

    def _append(self, name: str, text: str) -> None:
        """Write text to a descriptor in append mode: a killed process can tear the last line, never an earlier one."""
        if name not in self._appenders:
            self._appenders[name] = os.open(self.path / name, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        data = text.encode()
        while data:
            written = os.write(self._appenders[name], data)
            data = data[written:]

    def _close_appenders(self) -> None:
        for descriptor in self._appenders.values():
            os.close(descriptor)
        self._appenders.clear()

    # ---- checkpoints -----------------------------------------------------------------------------------------------

    def checkpoint_path(self, step: int) -> Path:
        """Return the path of the complete checkpoint of `step`, whether it exists yet or not."""
        return checkpoints.checkpoint_path(self.path, step)

    def begin_checkpoint(self, step: int) -> Path:
        """Make a new empty folder to write a checkpoint into. For rank 0 alone; it tells the name to the others."""
        return checkpoints.begin(self.checkpoint_path(step))

    def commit_checkpoint(self, tmp_dir: Path, step: int, about: Mapping[str, Any]) -> Path:
        """Complete the checkpoint and give it its final name, then delete those that `run.keep_*` does not keep.

        For rank 0, when every rank has finished writing. `about` (layout, ledger, versions) goes into manifest.json
        with the hash of the config and the fingerprints of the data. A kill at any moment leaves the old state or the
        new one.
        """
        if self._trackers is not None:
            self._trackers.flush()
        # What the checkpoint counts as recorded must reach the disk before the checkpoint does.
        for name in self._appenders:
            fsync(self.path / name)
        final = self.checkpoint_path(step)
        checkpoints.commit(Path(tmp_dir), final, {**self._identity, **about})
        keep = self._settings
        best = records.best_step(self.path, self.kind)
        dropped = checkpoints.retire(self.path, keep.keep_last, keep.keep_every, best)
        if dropped:
            self.log(
                f"checkpoints deleted (run.keep_last={keep.keep_last}, run.keep_every={keep.keep_every}): "
                f"steps {dropped}"
            )
        return final

    def latest_checkpoint(self) -> Path | None:
        """Return the newest checkpoint, or None if there is none. Its files exist and have their sizes.

        `core.session.resume` verifies the contents before it loads: that reads every byte, and all ranks share the
        work.

        Raises:
            UserError: a file is missing or has another size.
        """
        return checkpoints.newest(self.path)

    def rewind(self, step: int | None) -> None:
        """Cut metrics, ledger, train.log, rollouts and TensorBoard's curves back to `step` (None: to nothing)."""
        if not self.writes:
            return
        last = -1 if step is None else step
        self._close_appenders()  # the files are about to be replaced
        records.rewind(self.path, last)
        self._purge_step = last + 1

    # ---- start and end ---------------------------------------------------------------------------------------------

    def write_start(self, values: Mapping[str, Any]) -> None:
        """Write start.json of an RL run: start_step, role, sft_run, eflops_sft."""
        if self.writes:
            documents.write_start(self.path, values)

    @property
    def finished(self) -> bool:
        """True once the run has finished: a second start says so (`say_finished`) and changes nothing."""
        return documents.is_finished(self.path)

    def finish(self, summary: Mapping[str, Any], next_command: str) -> None:
        """Write summary.json, print the closing summary with the next command, and close the folder."""
        if self.writes:
            values = documents.write_summary(self.path, summary, next_command)
            _print_summary(f"{self.kind} run finished", self.path, values)
        self.close()

    def say_finished(self) -> None:
        """Print the closing summary of a run that had finished before this start."""
        if self.writes:
            values = documents.read_summary(self.path)
            _print_summary(f"{self.kind} run had finished before; nothing was changed", self.path, values)


def _refuse_foreign_folder(path: Path) -> None:
    """Raise UserError unless `path` is free, is a run folder, or holds only what is made for a run before it starts."""
    if not path.exists():
        return
    if not path.is_dir():
        raise UserError(f"run.dir {path} is a file; set run.dir to a folder")
    names = {entry.name for entry in path.iterdir()}
    foreign = sorted(names - _BEFORE_OPEN)
    if CONFIG not in names and foreign:
        raise UserError(
            f"run.dir {path} is not a run folder and not empty (it holds {', '.join(foreign[:5])}); set run.dir to a "
            "new folder"
        )


def _print_summary(title: str, path: Path, values: documents.Summary) -> None:
    from rich.table import Table
    from rich.text import Text

    console = make_console()
    table = Table(title=title, title_justify="left", show_header=False)
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    table.add_row("run folder", Text(str(path)))
    for key, value in values["summary"].items():
        table.add_row(Text(key), Text(f"{value:.4g}" if isinstance(value, float) else str(value)))
    console.print(table)
    console.print("Next:", style="bold")
    # Never broken over lines, so that it can be copied.
    console.print(f"  {values['next_command']}", soft_wrap=True, markup=False)
