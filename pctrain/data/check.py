"""`pctrain data check`: reads every record of some files, and reports what is in them and what is wrong with them.

Texts pass by one chunk of a file at a time. Of a record 44 bytes are kept: hashes of its prompt and of the whole,
lengths, its place.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from array import array
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from pctrain.common.errors import UserError
from pctrain.common.progress import Bar, progress
from pctrain.config.check_layout import model_shape
from pctrain.config.tree import Config, DataConfig
from pctrain.data.encode import Encoder, Unusable
from pctrain.data.lengths import Lengths
from pctrain.data.records import Fault, Record
from pctrain.data.sources import (
    Chunk,
    chunk_columns,
    list_disk_files,
    list_files,
    read_chunk,
    read_numbered,
    split_file,
)
from pctrain.data.troubles import MOST_PLACES, Trouble, Troubles
from pctrain.files.durable import plain, write_atomically

PICTURE, FIGURES = "lengths.png", "check.json"
MOST_FILES = 20  # rows of the table in the terminal; check.json has all files
NO_LIMIT = 1 << 40  # tokens; lengths are measured without a limit, and compared with the context afterwards
# The start of a box, an escaped character (so that \{ and \} do not count as braces), or a brace.
_BRACES = re.compile(r"\\boxed\s*\{|\\.|[{}]", re.DOTALL)


@dataclass
class FileCheck:
    """The counts of one file.

    `read_as` is trajectories (which need a response) or problems (which need an answer). `records` counts usable
    records, `unusable` the others.
    """

    path: Path
    read_as: str = "problems"
    columns: str = ""
    records: int = 0
    chats: int = 0
    unusable: int = 0


@dataclass(frozen=True)
class _Model:
    """The model that samples are measured for."""

    encoder: Encoder
    context: int  # tokens

    def count_tokens(self, record: Record, trajectory: bool) -> tuple[int, int]:
        """Return the tokens of the prompt (not trained on) and of the response with EOS (0 for a problem)."""
        if not trajectory:
            return len(self.encoder.prompt_ids(record)), 0
        sample = self.encoder.encode(record)
        trained = int((sample.spans[:, 1] - sample.spans[:, 0]).sum())
        return len(sample.tokens) - trained, trained


def check(paths: Sequence[Path], config: Config) -> DataCheck:
    """Check the files under a progress bar.

    Args:
        paths: files, globs, folders of data sets.
        config: `data` and `model.path` are used. With a model, lengths are also counted in tokens, as SFT encodes them.

    Raises:
        UserError: a path names no file, a format is not supported, or the model cannot be read.
    """
    files = list(dict.fromkeys(file for path in paths for file in list_files(path)))
    model = None
    if config.model.path is not None:
        context = model_shape(config.model).context
        model = _Model(Encoder(config.model.path, config.data, NO_LIMIT), context)
    result = DataCheck(files, config.data, model)
    sizes = [sum(part.stat().st_size for part in list_disk_files(file)) for file in files]
    with progress("checking", total=_megabytes(sum(sizes)), unit="MB") as bar:
        for number in range(len(files)):
            result.read_file(number, bar, sum(sizes[:number]))
            result.advance(bar, sum(sizes[: number + 1]))
    result.find_duplicates()
    return result


class DataCheck:
    """The check of some files: reading them, and showing and writing what was found.

    Attributes:
        files: one FileCheck per file.
        lengths: the lengths of all records that could be read, including records that are too long.
        troubles: what is wrong with the records.
    """

    def __init__(self, files: Sequence[Path], data: DataConfig, model: _Model | None):
        self.files = [FileCheck(file) for file in files]
        self.lengths = Lengths(None if model is None else model.context)
        self.troubles = Troubles()
        self._data, self._model = data, model
        # One entry per record that could be read: the number of its file, its line or row, and hashes of its texts.
        self._file, self._number = array("i"), array("q")
        self._prompt_hash, self._record_hash = array("Q"), array("Q")

    @property
    def records(self) -> int:
        """The number of usable records."""
        return sum(file.records for file in self.files)

    @property
    def unusable(self) -> int:
        """The number of unusable records."""
        return sum(file.unusable for file in self.files)

    @property
    def passed(self) -> bool:
        """True if every file and every record can be used."""
        return not self.troubles.any_unusable

    # ---- reading -----------------------------------------------------------------------------------------------------

    def read_file(self, number: int, bar: Bar, bytes_before: int) -> None:
        """Read all records of the file with this number."""
        file, answers = self.files[number], _Answers()
        try:
            for chunk in split_file(file.path):
                if not file.columns:
                    file.columns = chunk_columns(chunk, self._data.fields).describe()
                    file.read_as = _detect_kind(chunk, self._data)
                self._read_chunk(number, chunk, answers)
                self.advance(bar, bytes_before + chunk.done)
        except UserError as error:
            self.troubles.add("unreadable_file", str(file.path), str(error), unusable=True)
            return
        if not file.records + file.unusable:
            self.troubles.add("empty_file", str(file.path), unusable=True)
        answers.report(self.troubles)

    def advance(self, bar: Bar, done: int) -> None:
        """Move the bar to `done` bytes of all files."""
        bar.advance(_megabytes(done) - bar.done, records=self.records, unusable=self.unusable)

    def _read_chunk(self, number: int, chunk: Chunk, answers: _Answers) -> None:
        trajectories = self.files[number].read_as == "trajectories"
        need = ("response",) if trajectories else ("answer",)
        for line, record in read_numbered(chunk, self._data.fields, need):
            where = f"{chunk.file}:{line}"
            if isinstance(record, Fault):
                self._add_unusable(number, record.cause, where, record.message)
                continue
            try:
                tokens = None if self._model is None else self._model.count_tokens(record, trajectories)
            except Unusable as error:
                self._add_unusable(number, error.cause, where, str(error))
                continue
            self._add_record(number, line, record, tokens)
            self._check_length(number, where, tokens)
            answers.add(where, record)
            if trajectories:
                self._check_box(where, record)

    def _add_unusable(self, file: int, kind: str, where: str, message: str) -> None:
        self.files[file].unusable += 1
        self.troubles.add(kind, where, message, unusable=True)

    def _add_record(self, file: int, number: int, record: Record, tokens: tuple[int, int] | None) -> None:
        """Keep the lengths and hashes of a record that could be read."""
        self.files[file].chats += bool(record.messages)
        self._file.append(file)
        self._number.append(number)
        if record.messages:
            texts = [text for message in record.messages for text in (message.role, message.content)]
        else:
            texts = [record.required("prompt"), record.response or ""]
        self._prompt_hash.append(_hash([record.question]))
        self._record_hash.append(_hash([*texts, record.answer or ""]))
        self.lengths.add(record.question, record.trajectory, tokens)

    def _check_length(self, file: int, where: str, tokens: tuple[int, int] | None) -> None:
        """Count the record as usable, unless it is longer than the context and that is an error."""
        if self._model is not None and tokens is not None and sum(tokens) > self._model.context:
            message = f"{sum(tokens)} tokens, more than {self._model.context}"
            if self._data.overlong == "error":
                self._add_unusable(file, "overlong", where, message)
                return
            policy = f"data.overlong = {self._data.overlong}"
            self.troubles.add("overlong_policy", where, f"{message}; {policy}", unusable=False)
        self.files[file].records += 1

    def _check_box(self, where: str, record: Record) -> None:
        response = record.required("trajectory")
        unclosed = count_unclosed_boxes(response)
        if unclosed is None and record.answer is not None:
            self.troubles.add("no_box", where, f"the answer is {record.answer[:40]!r}", unusable=False)
        elif unclosed:
            self.troubles.add("unclosed_box", where, f"the response ends with {response[-40:]!r}", unusable=False)

    def find_duplicates(self) -> None:
        """Find records and prompts that an earlier record, of any file, has too. Call it after the last record."""
        none = np.zeros(len(self._file), bool)
        duplicate_records = self._find_repeated("duplicate_record", self._record_hash, none)
        self._find_repeated("duplicate_prompt", self._prompt_hash, duplicate_records)  # these are reported already

    def _find_repeated(self, kind: str, hashes: array, reported: np.ndarray) -> np.ndarray:
        _, first, inverse = np.unique(np.array(hashes, np.uint64), return_index=True, return_inverse=True)
        original = first[inverse]
        repeated = original != np.arange(len(original))
        new = np.flatnonzero(repeated & ~reported)
        places = [(self._place(index), f"as {self._place(original[index])}") for index in new[:MOST_PLACES]]
        self.troubles.merge(Trouble(kind, unusable=False, count=len(new), first=places))
        return repeated

    def _place(self, index: int) -> str:
        return f"{self.files[self._file[index]].path}:{self._number[index]}"

    # ---- showing and writing -----------------------------------------------------------------------------------------

    def write(self, folder: Path) -> list[Path]:
        """Write `folder`/check.json, and `folder`/lengths.png if there is a record to measure. Return their paths."""
        files = {FIGURES: json.dumps(self.as_json(), indent=1, ensure_ascii=False).encode() + b"\n"}
        if len(self._file):
            files[PICTURE] = self.lengths.picture(self._title())
        try:
            (folder / PICTURE).unlink(missing_ok=True)  # a picture of an earlier check would be taken for this one's
            for name, content in files.items():
                write_atomically(folder / name, content)
        except OSError as error:
            raise UserError(
                f"{folder}: the results cannot be written ({error.strerror}). Name another folder with --out DIR."
            ) from None
        return [folder / name for name in sorted(files, reverse=True)]

    def _title(self) -> str:
        first, *others = [str(file.path) for file in self.files]
        names = f"{first} and {len(others)} more" if others else first
        return f"{names[-100:]}: {len(self._file):,} records"

    def as_json(self) -> dict[str, Any]:
        """Return the content of check.json."""
        file_of = np.array(self._file, np.int64)
        files = [
            vars(file) | {"lengths": self.lengths.statistics(file_of == number)}
            for number, file in enumerate(self.files)
        ]
        return plain(
            {
                "passed": self.passed,
                "records": self.records,
                "unusable": self.unusable,
                "context": self.lengths.context,
                "lengths": self.lengths.statistics(),
                "files": files,
                "troubles": [trouble.as_json() for trouble in self.troubles.sorted()],
            }
        )

    def show(self, written: Sequence[Path], console: Console) -> None:
        """Print what was found, and the files that were written."""
        console.print(self._file_table())
        for line in self._column_lines():
            console.print(Text(line), soft_wrap=True)
        if len(self._file):
            console.print()
            console.print(self.lengths.table())
            console.print()
            for line in self.lengths.histogram_lines():
                console.print(Text(line))
        for trouble in self.troubles.sorted():
            console.print()
            for line in trouble.lines():
                console.print(Text(line), soft_wrap=True)
        console.print()
        console.print(Text(f"Wrote {' and '.join(map(str, written))}."), soft_wrap=True)
        console.print(Text(self.summary()), soft_wrap=True)

    def summary(self) -> str:
        """Return the verdict in one line."""
        troubles = self.troubles.sorted()
        files = f"{len(self.files)} file{'s' if len(self.files) > 1 else ''}"
        remarks = ", ".join(f"{trouble.count:,} {trouble.kind}" for trouble in troubles if not trouble.unusable)
        worth_a_look = f"; worth a look: {remarks}" if remarks else ""
        if self.passed:
            return f"all {self.records:,} records of {files} can be used{worth_a_look}"
        faults = ", ".join(f"{trouble.count:,} {trouble.kind}" for trouble in troubles if trouble.unusable)
        return (
            f"FAILED: {self.unusable:,} of {self.records + self.unusable:,} records of {files} cannot be used "
            f"({faults}){worth_a_look}"
        )

    def _file_table(self) -> Table:
        table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), show_edge=False)
        table.add_column("file", overflow="fold")
        table.add_column("read as", no_wrap=True)
        for name in ("usable", "chats", "unusable"):
            table.add_column(name, justify="right", no_wrap=True)
        for file in self.files[:MOST_FILES]:
            counts = (f"{count:,}" for count in (file.records, file.chats, file.unusable))
            table.add_row(Text(str(file.path)), file.read_as, *counts)
        if len(self.files) > MOST_FILES:
            table.add_row(f"and {len(self.files) - MOST_FILES} more (in {FIGURES})", "", "", "", "")
        if len(self.files) > 1:
            chats = sum(file.chats for file in self.files)
            table.add_row("all", "", f"{self.records:,}", f"{chats:,}", f"{self.unusable:,}")
        return table

    def _column_lines(self) -> list[str]:
        """Return one line for each choice of columns, with the files that it was made for."""
        chosen = Counter(file.columns for file in self.files if file.columns)
        lines = []
        for columns, count in chosen.items():
            files = ""
            if len(chosen) > 1:
                first = next(file.path for file in self.files if file.columns == columns)
                files = f" ({first} and {count - 1} more)" if count > 1 else f" ({first})"
            lines.append(f"columns: {columns}{files}")
        return lines


def _detect_kind(chunk: Chunk, data: DataConfig) -> str:
    """Return trajectories if any record of the file's first chunk has a response, otherwise problems.

    In a file of trajectories, a record without a response is a mistake, not a problem.
    """
    records = (record for record in read_chunk(chunk, data.fields, need=()) if isinstance(record, Record))
    return "trajectories" if any(record.trajectory for record in records) else "problems"


def count_unclosed_boxes(text: str) -> int | None:
    r"""Return the number of `\boxed{` without a closing brace, or None if there is no box."""
    if "\\boxed" not in text:
        return None
    boxes = 0
    opens_box: list[bool] = []  # for each open brace, whether it opens a box
    for token in _BRACES.finditer(text):
        mark = token.group()
        if mark == "}":
            if opens_box:
                opens_box.pop()
        elif mark == "{":
            opens_box.append(False)
        elif mark.startswith("\\boxed"):
            opens_box.append(True)
            boxes += 1
    return sum(opens_box) if boxes else None


class _Answers:
    """The records of a file without an answer. They are reported only if other records have one."""

    def __init__(self) -> None:
        self._any_answer = False
        self._without = Trouble("no_answer", unusable=False)

    def add(self, where: str, record: Record) -> None:
        if record.answer is None:
            self._without.add(where)
        else:
            self._any_answer = True

    def report(self, troubles: Troubles) -> None:
        if self._any_answer:
            troubles.merge(self._without)


def _megabytes(size: int) -> int:
    return math.ceil(size / 2**20)


def _hash(texts: Sequence[str]) -> int:
    """Return a hash of 64 bits. Among a million records, two different ones share a hash with a probability of 3e-8."""
    digest = hashlib.blake2b(digest_size=8)
    for text in texts:
        data = text.encode()
        digest.update(len(data).to_bytes(8, "little") + data)
    return int.from_bytes(digest.digest(), "little")
