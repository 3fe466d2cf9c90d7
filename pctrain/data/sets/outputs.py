"""What a command on trajectory sets leaves: the sets, the list of what was dropped and why, and a manifest; all of it or nothing.

    --out FILE:  FILE, FILE.dropped.jsonl, FILE.manifest.json
    --out DIR:   DIR/<set>.<suffix>, DIR/dropped.jsonl, DIR/manifest.json

Everything is written into `<out>.partial`. A folder is renamed to its name; of a file's three the file itself comes last, so where it is
there, the others are.
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
from pctrain.data.sets.options import Request
from pctrain.data.sources import list_disk_files
from pctrain.data.writing import FORMATS, write_records
from pctrain.files.durable import fingerprint, json_line, plain, write_beside
from pctrain.files.lock import lock_folder

DROPPED, MANIFEST = "dropped.jsonl", "manifest.json"
PROGRESS = "progress.jsonl"  # of a command that goes on where it was stopped: hours of sampling


class Outputs:
    """A context manager. Leaving it by an error removes what was written.

    inputs: every file that was read; none of them may be written to.
    names: the sets of a folder, file names; none: `out` is a file.
    resumable: a later start of the command goes on from PROGRESS in `<out>.partial`; where that is there, nothing is removed.
    """

    def __init__(self, request: Request, inputs: Iterable[Path], names: Iterable[str] = (), resumable: bool = False):
        self._request, self._inputs = request, [Path(file) for file in inputs]
        self.out: Path = request.options.out
        self._names, self._resumable = list(names), resumable
        if not self._names and suffix_of(self.out) is None:
            raise UserError(f"--out {self.out}: expected a file that ends with {', '.join(FORMATS)}")
        self._refuse_taken()
        self.folder = self.out.with_name(self.out.name + ".partial")
        if not resumable and (self.folder / PROGRESS).exists():
            raise UserError(
                f"{self.folder} holds the attempts of an unfinished `pctrain data winrate`; finish it with the same command, "
                "delete the folder, or name another --out"
            )
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(
                f"--out {self.out}: cannot be written ({error.strerror}); name a place you may write to"
            ) from None
        try:
            self._release = lock_folder(self.folder / ".lock")
        except UserError:
            raise UserError(
                f"--out {self.out}: another process is writing it (it holds {self.folder}); wait for it or stop it"
            ) from None
        self._clear()
        self._dropped = open(self.folder / DROPPED, "w", encoding="utf-8")
        self.reasons: Counter[str] = Counter()
        self.written: dict[str, int] = {}

    def _refuse_taken(self) -> None:
        final = [self.out] if self._names else [self.out, *self._beside().values()]
        for file in final:
            for given in self._inputs:
                if file.exists() and given.exists() and file.samefile(given):
                    raise UserError(f"--out {self.out}: would overwrite the input {given}; name another file")
        if self.out.exists() and (self.out.is_file() or not self.out.is_dir() or any(self.out.iterdir())):
            raise UserError(f"--out {self.out} exists already; delete it, or name another one")
        if self.out.is_dir() and not self._names:
            raise UserError(f"--out {self.out} is a folder; expected a file that ends with {', '.join(FORMATS)}")

    def _beside(self) -> dict[str, Path]:
        return {name: self.out.with_name(f"{self.out.name}.{name}") for name in (DROPPED, MANIFEST)}

    def write(self, values: Iterable[Mapping[str, Any]], name: str | None = None) -> int:
        """Writes one set (the one of a file has no name) and returns the number of its records. UserError where it has none."""
        name = name or self.out.name
        count = write_records(self.folder / name, values)
        if not count:
            found = ", ".join(f"{number} {reason}" for reason, number in self.reasons.most_common())
            where = f" for {name}" if self._names else ""
            raise UserError(f"{self.out}: nothing is left{where}" + (f" (dropped: {found})" if found else ""))
        self.written[name] = count
        return count

    def drop(self, where: str, identity: str | None, reason: str, **evidence: Any) -> None:
        """One record that is in no set. `evidence`: what shows the reason."""
        self.reasons[reason] += 1
        self._dropped.write(json_line(plain({"where": where, "id": identity, "reason": reason, **evidence})))

    def finish(self, read: int, **details: Any) -> dict[str, Any]:
        """Gives everything its name. `details`: the command's own figures. Returns the manifest."""
        self._dropped.close()
        manifest = plain(
            {
                "command": self._request.command,
                "arguments": self._request.arguments,
                "options": self._request.options.model_dump(mode="json"),
                "fields": self._request.config.data.fields.model_dump(exclude_none=True),
                "inputs": [described(file, file) for file in self._inputs],
                "outputs": [
                    {**described(self.folder / name, name), "records": count} for name, count in self.written.items()
                ],
                "records": {
                    "read": read,
                    "kept": sum(self.written.values()),
                    "dropped": dict(sorted(self.reasons.items())),
                },
                **details,
                "versions": versions(),
            }
        )
        write_beside(self.folder / MANIFEST, _pretty(manifest))
        self._publish()
        return manifest

    def _publish(self) -> None:
        (self.folder / ".lock").unlink()
        if self._names:
            if self.out.exists():
                self.out.rmdir()  # it is empty: that was looked at
            os.rename(self.folder, self.out)
        else:
            for name, final in self._beside().items():
                os.replace(self.folder / name, final)
            os.replace(self.folder / self.out.name, self.out)
            shutil.rmtree(self.folder)

    def _clear(self) -> None:
        """Removes what a killed process left."""
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
        """The table a command ends with."""
        from rich.table import Table
        from rich.text import Text

        table = Table(title=f"pctrain {self._request.command}", title_justify="left", show_header=False)
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
    """The suffix of a file of records; None where it has none of them."""
    return next((suffix for suffix in FORMATS if path.name.endswith(suffix) and path.name != suffix), None)


def versions() -> dict[str, str]:
    """What decides, beside the inputs and the options, what a command writes."""
    return {"pctrain": __version__, **{name: version(name) for name in ("numpy", "datasketch", "pyarrow")}}


def described(file: Path, name: Path | str) -> dict[str, Any]:
    """A file by its content; a data set's folder by the files in it."""
    if file.is_dir():
        return {"file": str(name), "files": [described(part, part.name) for part in list_disk_files(file)]}
    return {"file": str(name), "bytes": file.stat().st_size, "sha256": fingerprint(file)}


def _pretty(manifest: Mapping[str, Any]) -> str:
    return json.dumps(manifest, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
