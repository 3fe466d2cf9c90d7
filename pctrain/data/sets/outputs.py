"""The outputs of a command on trajectory sets: the sets, the dropped records with reasons, and a manifest.

All appear or none.

    --out FILE:  FILE, FILE.dropped.jsonl, FILE.manifest.json
    --out DIR:   DIR/<set>.<suffix>, DIR/dropped.jsonl, DIR/manifest.json

Everything is first written into `<out>.partial`. A folder is then renamed. Of the three files, the set itself is moved
last, so if it exists, the others do too.
"""

from __future__ import annotations

import json
import os
import shutil
from collections import Counter
from collections.abc import Iterable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from pctrain import __version__
from pctrain.common.errors import UserError
from pctrain.common.progress import make_console
from pctrain.data.records import Fault
from pctrain.data.sets.options import CommandCall
from pctrain.data.sources import list_disk_files
from pctrain.data.writing import FORMATS, write_records
from pctrain.files.durable import fingerprint, json_line, plain, write_atomically
from pctrain.files.lock import lock_folder

DROPPED, MANIFEST = "dropped.jsonl", "manifest.json"
PROGRESS = "progress.jsonl"  # the progress of a command that can be resumed, because it samples for hours


class Outputs:
    """A context manager for the outputs. Leaving it by an error removes what was written.

    Args:
        call: the call of the command.
        inputs: every file that is read. None of them may be overwritten.
        names: the file names of the sets in a folder; empty if `out` is a file.
        resumable: whether a later start of the command resumes from PROGRESS in `<out>.partial`. If that file exists,
            nothing is removed.
    """

    def __init__(self, call: CommandCall, inputs: Iterable[Path], names: Iterable[str] = (), resumable: bool = False):
        self._call, self._inputs = call, [Path(file) for file in inputs]
        self.out: Path = call.options.out
        self._names, self._resumable = list(names), resumable
        if not self._names and suffix_of(self.out) is None:
            raise UserError(f"--out {self.out}: expected a file that ends with {', '.join(FORMATS)}")
        self._refuse_existing()
        self.folder = self.out.with_name(self.out.name + ".partial")
        if not resumable and (self.folder / PROGRESS).exists():
            raise UserError(
                f"{self.folder} holds the attempts of an unfinished `pctrain data winrate`. "
                "Finish it with the same command, delete the folder, or name another --out."
            )
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(
                f"--out {self.out}: cannot be written ({error.strerror}). Name a place that you may write to."
            ) from None
        try:
            self._release = lock_folder(self.folder / ".lock")
        except UserError:
            raise UserError(
                f"--out {self.out}: another process is writing it (it holds {self.folder}). Wait for it, or stop it."
            ) from None
        self._remove_leftovers()
        self._dropped = open(self.folder / DROPPED, "w", encoding="utf-8")  # noqa: SIM115 - `finish` closes it
        self.reasons: Counter[str] = Counter()
        self.written: dict[str, int] = {}

    def _refuse_existing(self) -> None:
        final = [self.out] if self._names else [self.out, *self._companions().values()]
        for file in final:
            for given in self._inputs:
                if file.exists() and given.exists() and file.samefile(given):
                    raise UserError(f"--out {self.out}: would overwrite the input {given}. Name another file.")
        if self.out.exists() and (self.out.is_file() or not self.out.is_dir() or any(self.out.iterdir())):
            raise UserError(f"--out {self.out} exists already. Delete it, or name another one.")
        if self.out.is_dir() and not self._names:
            raise UserError(f"--out {self.out} is a folder; expected a file that ends with {', '.join(FORMATS)}")

    def _companions(self) -> dict[str, Path]:
        """Return the paths of the two files that accompany a set."""
        return {name: self.out.with_name(f"{self.out.name}.{name}") for name in (DROPPED, MANIFEST)}

    def write(self, values: Iterable[Mapping[str, Any]], name: str | None = None) -> int:
        """Write one set and return the number of its records. `name` is its name in a folder.

        Raises:
            UserError: the set would be empty.
        """
        name = name or self.out.name
        count = write_records(self.folder / name, values)
        if not count:
            dropped = ", ".join(f"{number} {reason}" for reason, number in self.reasons.most_common())
            where = f" for {name}" if self._names else ""
            raise UserError(f"{self.out}: no record is left{where}" + (f" (dropped: {dropped})" if dropped else ""))
        self.written[name] = count
        return count

    def drop(self, where: str, identity: str | None, reason: str, **evidence: Any) -> None:
        """List a record that is in no set, with the reason and the evidence for it."""
        self.reasons[reason] += 1
        self._dropped.write(json_line(plain({"where": where, "id": identity, "reason": reason, **evidence})))

    def drop_unusable(self, fault: Fault) -> None:
        """List a record that cannot be read."""
        self.drop(fault.where, None, f"unusable: {fault.cause}", message=fault.message)

    def finish(self, read: int, **details: Any) -> dict[str, Any]:
        """Write the manifest, with the command's own figures in `details`, and publish all outputs.

        Return the manifest.
        """
        self._dropped.close()
        outputs = [
            {**describe_file(self.folder / name, name), "records": count} for name, count in self.written.items()
        ]
        manifest = plain(
            {
                "command": self._call.command,
                "arguments": self._call.arguments,
                "options": self._call.options.model_dump(mode="json"),
                "fields": self._call.config.data.fields.model_dump(exclude_none=True),
                "inputs": [describe_file(file, file) for file in self._inputs],
                "outputs": outputs,
                "records": {
                    "read": read,
                    "kept": sum(self.written.values()),
                    "dropped": dict(sorted(self.reasons.items())),
                },
                **details,
                "versions": versions(),
            }
        )
        write_atomically(self.folder / MANIFEST, _pretty(manifest))
        self._publish()
        return manifest

    def _publish(self) -> None:
        (self.folder / ".lock").unlink()
        if self._names:
            if self.out.exists():
                self.out.rmdir()  # it is empty, as checked at the start
            os.rename(self.folder, self.out)
        else:
            for name, final in self._companions().items():
                os.replace(self.folder / name, final)
            os.replace(self.folder / self.out.name, self.out)
            shutil.rmtree(self.folder)

    def _remove_leftovers(self) -> None:
        """Remove what a killed process left behind."""
        for entry in self.folder.iterdir():
            if entry.name not in (".lock", PROGRESS):
                shutil.rmtree(entry) if entry.is_dir() else entry.unlink()

    def __enter__(self) -> Outputs:
        return self

    def __exit__(self, *error: object) -> None:
        self._dropped.close()
        if self.folder.exists() and not (self._resumable and (self.folder / PROGRESS).exists()):
            shutil.rmtree(self.folder)
        self._release()

    def report(self, manifest: Mapping[str, Any], *more: tuple[str, Any]) -> None:
        """Print the summary table of the command."""
        from rich.table import Table
        from rich.text import Text

        table = Table(title=f"pctrain {self._call.command}", title_justify="left", show_header=False)
        table.add_column(style="bold")
        table.add_column(overflow="fold")
        records = manifest["records"]
        rows = [("records read", f"{records['read']:,}")]
        rows += [
            (output["file"] if self._names else "kept", f"{output['records']:,}") for output in manifest["outputs"]
        ]
        rows += [(f"dropped: {reason}", f"{count:,}") for reason, count in records["dropped"].items()]
        for key, value in (*rows, *more, ("written to", self.out)):
            table.add_row(Text(str(key)), Text(str(value)))
        make_console().print(table)


def suffix_of(path: Path) -> str | None:
    """Return the suffix of a file of records, or None if it has none of the supported ones."""
    return next((suffix for suffix in FORMATS if path.name.endswith(suffix) and path.name != suffix), None)


def versions() -> dict[str, str]:
    """Return the versions that the outputs of a command depend on, besides its inputs and options."""
    return {"pctrain": __version__, **{name: version(name) for name in ("numpy", "datasketch", "pyarrow")}}


def describe_file(file: Path, name: Path | str) -> dict[str, Any]:
    """Return the size and the hash of a file, or of all files of a data set's folder, for a manifest."""
    if file.is_dir():
        return {"file": str(name), "files": [describe_file(part, part.name) for part in list_disk_files(file)]}
    return {"file": str(name), "bytes": file.stat().st_size, "sha256": fingerprint(file)}


def _pretty(manifest: Mapping[str, Any]) -> str:
    return json.dumps(manifest, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
