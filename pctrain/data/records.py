"""Records of a data set (a prompt with its response or answer, or a chat), and faults: records that cannot be used."""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass
from decimal import Decimal
from typing import Any, Literal

from pctrain.data.columns import Columns, MissingField, json_kind, look_up

NEEDS = frozenset({"prompt", "response", "answer"})
ROLES = ("system", "developer", "user", "assistant", "tool")
# What to do about a record that cannot be read, by cause. Causes of other stages carry the advice in their message.
ADVICE = {
    "not_utf8": "Convert the file to UTF-8, for example with `iconv -f LATIN1 -t UTF-8`.",
    "malformed_json": "Write one JSON object per line, for example with `jq -c . FILE`.",
    "not_an_object": "Write one JSON object per line; `jq -c '.[]' FILE` turns a JSON array into such lines.",
    "missing_field": "Name the right column with data.fields, or add the field.",
    "wrong_type": "Name the right column with data.fields, or fix the value.",
    "surrogate": "Encode the text again as valid Unicode.",
    "empty_prompt": "Fill in the prompt, or remove the record.",
    "empty_response": "Fill in the response, or remove the record.",
    "empty_answer": "Fill in the gold answer, or remove the record.",
    "bad_chat": "Fix the messages, or remove the record.",
}


@dataclass(frozen=True)
class Message:
    """One turn of a chat. `role` is one of ROLES."""

    role: str
    content: str


@dataclass(frozen=True)
class Record:
    """A prompt with its response, its answer or both; or a chat.

    A chat has `messages`, and its `prompt` and `response` are None. `id` is the record's own `id` field if it has one,
    otherwise "<file name>:<line or row>".
    """

    id: str
    prompt: str | None = None
    response: str | None = None
    answer: str | None = None
    messages: tuple[Message, ...] = ()

    @property
    def question(self) -> str:
        """The prompt; for a chat, the turns before the assistant's last one, joined by blank lines."""
        if not self.messages:
            return self.required("prompt")
        asked = self.messages[:-1] if self.messages[-1].role == "assistant" else self.messages
        return "\n\n".join(message.content for message in asked)

    @property
    def trajectory(self) -> str | None:
        """The response; for a chat, the assistant's turn that ends it, or None if another role has the last turn."""
        if not self.messages:
            return self.response
        return self.messages[-1].content if self.messages[-1].role == "assistant" else None

    def required(self, name: Literal["prompt", "response", "answer", "trajectory"]) -> str:
        """Return a text that the caller asked for with `need` when the record was read.

        Raises:
            ValueError: the record has no such text, so the caller did not ask for it.
        """
        text: str | None = getattr(self, name)
        if text is None:
            raise ValueError(f"record {self.id} has no {name}; read the records with need=({name!r},)")
        return text


@dataclass(frozen=True)
class Fault:
    """A record that cannot be used.

    `where` is "<path>:<line or row>". `cause` is a key of ADVICE, or a cause of `pctrain.data.encode.Unusable`.
    """

    where: str
    cause: str
    message: str

    def __str__(self) -> str:
        advice = ADVICE.get(self.cause)
        return f"{self.where}: {self.message}" + (f". {advice}" if advice else "")


class Unreadable(ValueError):
    """The reason a record cannot be made. `cause` is a key of ADVICE."""

    def __init__(self, cause: str, message: str):
        # Names of columns may contain halves of surrogate pairs, which neither a terminal nor a file accepts.
        super().__init__(message.encode("utf-8", "backslashreplace").decode())
        self.cause = cause


def make_record(value: dict[str, Any], identity: str, columns: Columns, need: Collection[str]) -> Record:
    """Return the record that one object holds.

    Args:
        value: the object, as read from JSON or a table.
        identity: the record's id if the object has no `id`.
        columns: the paths of the record's fields.
        need: the fields that the record must have in addition to the prompt: "response", "answer" or both. A chat has a
            response if its last turn is the assistant's. Other fields are read if they are well-formed, and are None
            otherwise.

    Raises:
        Unreadable: a needed field is missing, empty or not text. An answer may also be a number.
    """
    own_id = value.get("id")
    if isinstance(own_id, (str, int)) and not isinstance(own_id, bool) and own_id != "":
        identity = str(own_id)
        _refuse_surrogates(identity, "field 'id'")
    answer = _read_text(value, "answer", columns.answer, needed="answer" in need)
    if columns.messages is not None:
        return Record(identity, answer=answer, messages=_read_chat(value, columns.messages, need))
    return Record(
        identity,
        _read_text(value, "prompt", columns.prompt, needed=True),
        _read_text(value, "response", columns.response, needed="response" in need),
        answer,
    )


def _read_text(value: dict[str, Any], name: str, path: str | None, *, needed: bool) -> str | None:
    try:
        return _checked_text(value, name, path)
    except Unreadable:
        if needed:
            raise
    return None


def _checked_text(value: dict[str, Any], name: str, path: str | None) -> str:
    if path is None:
        raise Unreadable("missing_field", f"data.fields names no column for the {name}")
    content = _look_up(value, path)
    is_answer = name == "answer"
    if is_answer and _is_number(content):
        content = str(content)
    if not isinstance(content, str):
        expected = "a string or a number" if is_answer else "a string"
        raise Unreadable("wrong_type", f"field {path!r}: expected {expected}, got {json_kind(content)}")
    if not content.strip():
        raise Unreadable(f"empty_{name}", f"field {path!r} is empty; expected text")
    _refuse_surrogates(content, f"field {path!r}")
    return content


def _look_up(value: dict[str, Any], path: str) -> Any:
    try:
        return look_up(value, path)
    except MissingField as error:
        raise Unreadable("missing_field", str(error)) from None


def _is_number(content: Any) -> bool:
    if isinstance(content, bool) or not isinstance(content, (int, float, Decimal)):
        return False
    return math.isfinite(content)


def _read_chat(value: dict[str, Any], path: str, need: Collection[str]) -> tuple[Message, ...]:
    turns = _look_up(value, path)
    if not isinstance(turns, list):
        raise Unreadable("wrong_type", f"field {path!r}: expected a list of messages, got {json_kind(turns)}")
    messages = tuple(
        _read_message(turn, f"field {path!r}, message {number}") for number, turn in enumerate(turns, start=1)
    )
    ends_with_assistant = bool(messages) and messages[-1].role == "assistant"
    asked = messages[:-1] if ends_with_assistant else messages
    if not any(message.content.strip() for message in asked):
        raise Unreadable("empty_prompt", f"field {path!r}: expected text before the assistant's last turn, got none")
    if "response" in need and not ends_with_assistant:
        raise Unreadable(
            "bad_chat", f"field {path!r}: the chat ends with a turn of role {messages[-1].role!r}; expected 'assistant'"
        )
    if "response" in need and not messages[-1].content.strip():
        raise Unreadable("empty_response", f"field {path!r}: the assistant's last turn is empty; expected text")
    return messages


def _read_message(turn: Any, name: str) -> Message:
    if not isinstance(turn, dict):
        raise Unreadable("bad_chat", f"{name}: expected an object with role and content, got {json_kind(turn)}")
    role, content = turn.get("role"), turn.get("content")
    if role not in ROLES:
        raise Unreadable("bad_chat", f"{name}: expected a role of {', '.join(ROLES)}, got {role!r}")
    if not isinstance(content, str):
        raise Unreadable("bad_chat", f"{name}: expected a string as content, got {json_kind(content)}")
    _refuse_surrogates(content, name)
    return Message(role, content)


def _refuse_surrogates(text: str, name: str) -> None:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise Unreadable(
            "surrogate", f"{name} holds half of a surrogate pair (\\ud800 to \\udfff); expected valid Unicode"
        ) from None
