"""`pctrain data check`: looks at every record of some files and says what is in them and what is wrong with them.

Texts pass by a part of a file at a time; what stays of a record is 44 bytes: hashes of its prompt and of the whole,
lengths, and its place.
"""

from __future__ import annotations

import hashlib
import math
import re
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from pctrain.common.errors import UserError
from pctrain.common.progress import Bar, progress
from pctrain.config import check_layout as config_check
from pctrain.config.tree import Config
from pctrain.data.encode import Encoder, Unusable
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

FIRST_PLACES = 5  # named of each trouble
NO_LIMIT = 1 << 40  # tokens: lengths are measured here, and compared afterwards
# A box opening, an escaped character (so that \{ and \} are no braces), or a brace.
_BRACES = re.compile(r"\\boxed\s*\{|\\.|[{}]", re.DOTALL)
# What to do about each trouble. The first ones make a record unusable, the others are worth a look.
UNUSABLE = {
    "unreadable_file": "the file cannot be read to its end; make or copy it again",
    "empty_file": "there is no record in it; leave it out",
    "not_utf8": "bytes that are no UTF-8; convert the file (iconv -f LATIN1 -t UTF-8)",
    "malformed_json": "the line is no JSON; write one object a line (jq -c . FILE)",
    "not_an_object": "the line is JSON, but no object; write one object a line (jq -c '.[]' FILE makes them of a list)",
    "missing_field": "a column is not there; name the right one by data.fields",
    "wrong_type": "a column holds something else than text; name the right one by data.fields, or mend it",
    "surrogate": "half of a surrogate pair, which no tokenizer takes; encode the text again",
    "empty_prompt": "nothing is asked; remove the record",
    "empty_response": "nothing is answered; remove the record",
    "empty_answer": "the gold answer is empty; fill it in or remove the record",
    "bad_chat": "not a chat that ends with an assistant's turn; mend or remove the record",
    "overlong": "longer than the model's context; shorten or remove it, or set data.overlong to drop or right",
}
TEMPLATE = "the chat template cannot write it so that it can be trained on; see docs/contracts.md, or set data.template"
REMARKS = {
    "duplicate_record": "the very same record again: it is trained on more than once",
    "duplicate_prompt": "a prompt again (several trajectories of one prompt, or a leak between sets)",
    "no_answer": "no gold answer, where other records of the file have one",
    "unclosed_box": "\\boxed{ without its closing brace: the response may have been cut off, and its answer is not found",
    "no_box": "an answer is given, but the response has no \\boxed{...} to read one from",
    "overlong_policy": "longer than the model's context; data.overlong says what becomes of it",
}


@dataclass
class Trouble:
    """`unusable`: a record that has it cannot be used. `first`: (place, what is wrong there), at most FIRST_PLACES."""

    kind: str
    unusable: bool
    count: int = 0
    first: list[tuple[str, str]] = field(default_factory=list)

    @property
    def advice(self) -> str:
        return UNUSABLE.get(self.kind) or REMARKS.get(self.kind) or TEMPLATE

    def add(self, where: str, message: str = "") -> None:
        self.count += 1
        if len(self.first) < FIRST_PLACES:
            self.first.append((where, message))


@dataclass
class FileCheck:
    """`read_as`: trajectories (they need a response) or problems (they need an answer).

    `records` can be used, `unusable` cannot.
    """

    path: Path
    read_as: str = "problems"
    columns: str = ""
    records: int = 0
    chats: int = 0
    unusable: int = 0


class Check:
    """What was found.

    Attributes:
        files: one FileCheck each.
        lengths: {"prompt, characters": int64 [n], "response, tokens": ..., ...} of the records that can be read, also
            where they are too long, in order; -1: it has none.
        file_of: int64 [n], the number of each record's file.
        limit: the model's context, tokens; None without a model.
    """

    def __init__(self, files: Sequence[Path], limit: int | None):
        self.files = [FileCheck(file) for file in files]
        self.limit = limit
        self._troubles: dict[str, Trouble] = {}
        self._file, self._number = array("i"), array("q")
        self._prompt_hash, self._record_hash = array("Q"), array("Q")
        names = ["prompt, characters", "response, characters"]
        names += ["prompt, tokens", "response, tokens", "sample, tokens"] if limit is not None else []
        self._lengths = {name: array("q") for name in names}

    @property
    def lengths(self) -> dict[str, np.ndarray]:
        return {name: np.array(values, np.int64) for name, values in self._lengths.items()}

    @property
    def file_of(self) -> np.ndarray:
        return np.array(self._file, np.int64)

    @property
    def troubles(self) -> list[Trouble]:
        """Those there are: what makes records unusable first, and the more frequent before the others."""
        return sorted(self._troubles.values(), key=lambda trouble: (not trouble.unusable, -trouble.count))

    @property
    def records(self) -> int:
        return sum(file.records for file in self.files)

    @property
    def unusable(self) -> int:
        return sum(file.unusable for file in self.files)

    @property
    def passed(self) -> bool:
        return not any(trouble.unusable for trouble in self._troubles.values())

    def add_trouble(self, kind: str, where: str, message: str = "", *, unusable: bool) -> None:
        self._troubles.setdefault(kind, Trouble(kind, unusable)).add(where, message)

    def put(self, trouble: Trouble) -> None:
        """Joins what was gathered of one trouble elsewhere."""
        if trouble.count:
            known = self._troubles.setdefault(trouble.kind, Trouble(trouble.kind, trouble.unusable))
            known.count += trouble.count
            known.first = (known.first + trouble.first)[:FIRST_PLACES]

    def add_fault(self, file: int, kind: str, where: str, message: str) -> None:
        self.files[file].unusable += 1
        self.add_trouble(kind, where, message, unusable=True)

    def add_record(self, file: int, number: int, record: Record, tokens: tuple[int, int] | None) -> None:
        """What stays of a record that can be read.

        `tokens`: of the prompt and of the response with EOS (0: a problem has none).
        """
        self.files[file].chats += bool(record.messages)
        self._file.append(file)
        self._number.append(number)
        texts = [text for m in record.messages for text in (m.role, m.content)] or [
            record.prompt,
            record.response or "",
        ]
        self._prompt_hash.append(_hash([record.question]))
        self._record_hash.append(_hash([*texts, record.answer or ""]))
        measured = {"prompt, characters": len(record.question), "response, characters": _length(record.trajectory)}
        if tokens is not None:
            prompt, response = tokens
            measured |= {
                "prompt, tokens": prompt,
                "response, tokens": response or -1,
                "sample, tokens": prompt + response,
            }
        for name, length in measured.items():
            self._lengths[name].append(length)

    def find_duplicates(self) -> None:
        """After the last record. A prompt counts where an earlier record, of any of the files, has it."""
        repeated = self._repeated("duplicate_record", self._record_hash, np.zeros(len(self._file), bool))
        self._repeated("duplicate_prompt", self._prompt_hash, repeated)  # the same record again is told once

    def _repeated(self, kind: str, hashes: array, known: np.ndarray) -> np.ndarray:
        _, first, inverse = np.unique(np.array(hashes, np.uint64), return_index=True, return_inverse=True)
        original = first[inverse]
        again = original != np.arange(len(original))
        told = np.flatnonzero(again & ~known)
        places = [(self._where(index), f"as {self._where(original[index])}") for index in told[:FIRST_PLACES]]
        self.put(Trouble(kind, unusable=False, count=len(told), first=places))
        return again

    def _where(self, index: int) -> str:
        return f"{self.files[self._file[index]].path}:{self._number[index]}"


def check(paths: Sequence[Path], config: Config) -> Check:
    """Reads the files under a progress bar.

    Args:
        paths: files, globs, folders of data sets.
        config: `data` and `model.path` are read; with a model lengths are counted in tokens too, as SFT makes them.
    Raises:
        UserError: a path that names no file, or one of another format; a model that cannot be read.
    """
    files = list(dict.fromkeys(file for path in paths for file in list_files(path)))
    encoder = limit = None
    if config.model.path is not None:
        limit = config_check.model_shape(config.model).context
        encoder = Encoder(config.model.path, config.data, NO_LIMIT)
    found = Check(files, limit)
    sizes = [sum(part.stat().st_size for part in list_disk_files(file)) for file in files]
    with progress("checking", total=_megabytes(sum(sizes)), unit="MB") as bar:
        for number, file in enumerate(files):
            _check_file(found, number, config, encoder, bar, sum(sizes[:number]))
            bar.advance(_megabytes(sum(sizes[: number + 1])) - bar.done, records=found.records, unusable=found.unusable)
    found.find_duplicates()
    return found


def _check_file(found: Check, number: int, config: Config, encoder: Encoder | None, bar: Bar, before: int) -> None:
    file, answers = found.files[number], _Answers()
    try:
        for chunk in split_file(file.path):
            if not file.columns:
                file.columns = chunk_columns(chunk, config.data.fields).describe()
                file.read_as = _read_as(chunk, config)
            _check_chunk(found, number, chunk, config, encoder, answers)
            bar.advance(_megabytes(before + chunk.done) - bar.done, records=found.records, unusable=found.unusable)
    except UserError as error:
        found.add_trouble("unreadable_file", str(file.path), str(error), unusable=True)
        return
    if not file.records + file.unusable:
        found.add_trouble("empty_file", str(file.path), unusable=True)
    answers.tell(found)


def _read_as(chunk: Chunk, config: Config) -> str:
    """Trajectories where any record of the file's first part has a response: what lacks one there is a mistake, not a problem."""
    records = (record for record in read_chunk(chunk, config.data.fields, need=()) if isinstance(record, Record))
    return "trajectories" if any(record.trajectory for record in records) else "problems"


def _check_chunk(
    found: Check, number: int, chunk: Chunk, config: Config, encoder: Encoder | None, answers: _Answers
) -> None:
    trajectories = found.files[number].read_as == "trajectories"
    for line, record in read_numbered(chunk, config.data.fields, need=("response",) if trajectories else ("answer",)):
        where = f"{chunk.file}:{line}"
        if isinstance(record, Fault):
            found.add_fault(number, record.cause, where, record.message)
            continue
        try:
            tokens = None if encoder is None else _tokens(encoder, record, trajectories)
        except Unusable as error:
            found.add_fault(number, error.cause, where, str(error))
            continue
        found.add_record(number, line, record, tokens)
        _check_length(found, number, where, tokens, config.data.overlong)
        answers.add(where, record)
        if trajectories:
            _check_box(found, where, record)


def _tokens(encoder: Encoder, record: Record, trajectory: bool) -> tuple[int, int]:
    """Tokens of the prompt (what is not trained on) and of the response with EOS; a problem has the first alone."""
    if not trajectory:
        return len(encoder.prompt_ids(record)), 0
    sample = encoder.encode(record)
    trained = int((sample.spans[:, 1] - sample.spans[:, 0]).sum())
    return len(sample.tokens) - trained, trained


def _check_length(found: Check, number: int, where: str, tokens: tuple[int, int] | None, policy: str) -> None:
    overlong = tokens is not None and sum(tokens) > found.limit
    message = f"{sum(tokens)} tokens, more than {found.limit}" if overlong else ""
    if overlong and policy == "error":
        found.add_fault(number, "overlong", where, message)
        return
    if overlong:
        found.add_trouble("overlong_policy", where, f"{message}; data.overlong = {policy}", unusable=False)
    found.files[number].records += 1


def _check_box(found: Check, where: str, record: Record) -> None:
    boxes = open_boxes(record.trajectory)
    if boxes is None:
        if record.answer is not None:
            found.add_trouble("no_box", where, f"the answer is {record.answer[:40]!r}", unusable=False)
    elif boxes:
        found.add_trouble("unclosed_box", where, f"it ends with {record.trajectory[-40:]!r}", unusable=False)


def open_boxes(text: str) -> int | None:
    r"""How many `\boxed{` have no closing brace; None where there is no box at all."""
    if "\\boxed" not in text:
        return None
    boxes, braces = 0, []  # of the open braces: whether it is a box's
    for token in _BRACES.finditer(text):
        mark = token.group()
        if mark == "}":
            if braces:
                braces.pop()
        elif mark == "{" or mark.startswith("\\boxed"):
            boxes += mark != "{"
            braces.append(mark != "{")
    return sum(braces) if boxes else None


class _Answers:
    """Records of a file without an answer are worth a word only where others have one."""

    def __init__(self) -> None:
        self.some = False
        self.without = Trouble("no_answer", unusable=False)

    def add(self, where: str, record: Record) -> None:
        if record.answer is None:
            self.without.add(where)
        else:
            self.some = True

    def tell(self, found: Check) -> None:
        if self.some:
            found.put(self.without)


def _megabytes(size: int) -> int:
    return math.ceil(size / 2**20)


def _length(text: str | None) -> int:
    return -1 if text is None else len(text)


def _hash(texts: Sequence[str]) -> int:
    """64 bits: among a million records two different ones have the same with a chance of 3e-8."""
    digest = hashlib.blake2b(digest_size=8)
    for text in texts:
        data = text.encode()
        digest.update(len(data).to_bytes(8, "little") + data)
    return int.from_bytes(digest.digest(), "little")
