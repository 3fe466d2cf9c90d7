"""The troubles that `pctrain data check` finds: their kinds, what to do about each, and how they are shown."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from pctrain.data.records import ADVICE

MOST_PLACES = 5  # places to name for each trouble
# What is wrong with a record that cannot be read. `records.ADVICE` says what to do about it.
UNREADABLE = {
    "not_utf8": "the bytes are not UTF-8",
    "malformed_json": "the line is not valid JSON",
    "not_an_object": "the line is JSON, but not an object",
    "missing_field": "the record does not have the field",
    "wrong_type": "the field is not text",
    "surrogate": "the text holds half of a surrogate pair, which no tokenizer accepts",
    "empty_prompt": "the prompt is empty",
    "empty_response": "the response is empty",
    "empty_answer": "the gold answer is empty",
    "bad_chat": "the field is not a chat that ends with an assistant's turn",
}
# Other troubles that make a record or a file unusable.
UNUSABLE = {
    "unreadable_file": "the file cannot be read to its end. Make or copy it again.",
    "empty_file": "the file has no records. Leave it out.",
    "overlong": (
        "the sample is longer than the model's context. Shorten or remove it, or set data.overlong to drop or right."
    ),
}
TEMPLATE = (
    "the chat template cannot write the record so that it can be trained on. "
    "See docs/reference/data.md, or set data.template to another template."
)
# Remarks: the records can be used, but they are worth a look.
REMARKS = {
    "duplicate_record": "the same record appears again, so it is trained on more than once",
    "duplicate_prompt": "a prompt appears again: several trajectories of one prompt, or a leak between sets",
    "no_answer": "the record has no gold answer, but other records of the file have one",
    "unclosed_box": (
        "\\boxed{ has no closing brace: the response may have been cut off, and its answer cannot be extracted"
    ),
    "no_box": "the record has an answer, but the response has no \\boxed{...} to extract one from",
    "overlong_policy": "the sample is longer than the model's context; data.overlong decides what happens to it",
}


@dataclass
class Trouble:
    """One kind of trouble. `first` has the place and the message of the first cases, at most MOST_PLACES.

    If `unusable`, a record with this trouble cannot be used. Otherwise the trouble is a remark.
    """

    kind: str
    unusable: bool
    count: int = 0
    first: list[tuple[str, str]] = field(default_factory=list)

    @property
    def advice(self) -> str:
        """The problem, and what to do about it."""
        if self.kind in UNREADABLE:
            return f"{UNREADABLE[self.kind]}. {ADVICE[self.kind]}"
        return UNUSABLE.get(self.kind) or REMARKS.get(self.kind) or TEMPLATE

    def add(self, where: str, message: str = "") -> None:
        """Count one more case."""
        self.count += 1
        if len(self.first) < MOST_PLACES:
            self.first.append((where, message))

    def as_json(self) -> dict[str, Any]:
        """Return the entry of check.json."""
        return vars(self) | {"advice": self.advice}

    def lines(self) -> list[str]:
        """Return the text for the terminal: a heading, and one line per place."""
        severity = "unusable" if self.unusable else "remark"
        lines = [f"{severity}: {self.count:,} {self.kind}: {self.advice}"]
        lines += [f"  {_printable(_with_place(where, message))}" for where, message in self.first]
        if self.count > len(self.first):
            lines.append(f"  and {self.count - len(self.first):,} more")
        return lines


class Troubles:
    """All troubles of one check."""

    def __init__(self) -> None:
        self._by_kind: dict[str, Trouble] = {}

    def add(self, kind: str, where: str, message: str = "", *, unusable: bool) -> None:
        """Count one more case of a kind."""
        self._by_kind.setdefault(kind, Trouble(kind, unusable)).add(where, message)

    def merge(self, trouble: Trouble) -> None:
        """Add the cases of a trouble that was collected separately."""
        if trouble.count:
            known = self._by_kind.setdefault(trouble.kind, Trouble(trouble.kind, trouble.unusable))
            known.count += trouble.count
            known.first = (known.first + trouble.first)[:MOST_PLACES]

    def sorted(self) -> list[Trouble]:
        """Return the troubles: those that make records unusable first, and frequent ones before rare ones."""
        return sorted(self._by_kind.values(), key=lambda trouble: (not trouble.unusable, -trouble.count))

    @property
    def any_unusable(self) -> bool:
        """True if a record or a file cannot be used."""
        return any(trouble.unusable for trouble in self._by_kind.values())


def _with_place(where: str, message: str) -> str:
    """Return `where: message`, or just the message if it names the place already, as for an unreadable file."""
    if not message:
        return where
    return message if where in message else f"{where}: {message}"


def _printable(text: str) -> str:
    """Replace control characters, which must not reach the terminal."""
    return "".join(character if character.isprintable() else " " for character in text)
