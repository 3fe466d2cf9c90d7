"""A record of a data set: a question and what answers it, or a chat; and the fault of one that cannot be used."""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

from pctrain.data.columns import Columns, Missing, kind, look_up

NEEDS = frozenset({"prompt", "response", "answer"})
ROLES = ("system", "developer", "user", "assistant", "tool")


@dataclass(frozen=True)
class Message:
    """One turn of a chat. `role` is one of ROLES."""

    role: str
    content: str


@dataclass(frozen=True)
class Record:
    """A prompt with its response or its answer or both, or a chat: `messages`, and prompt and response are None.

    `id` is "<file name>:<line or row>" unless the record has an `id` of its own.
    """

    id: str
    prompt: str | None = None
    response: str | None = None
    answer: str | None = None
    messages: tuple[Message, ...] = ()

    @property
    def question(self) -> str:
        """The text asked: the prompt, or the turns before the assistant's last word, a blank line between them."""
        if not self.messages:
            return self.prompt
        asked = self.messages[:-1] if self.messages[-1].role == "assistant" else self.messages
        return "\n\n".join(message.content for message in asked)

    @property
    def trajectory(self) -> str | None:
        """The text answered: the response, or the assistant's turn that ends the chat."""
        if not self.messages:
            return self.response
        return self.messages[-1].content if self.messages[-1].role == "assistant" else None


@dataclass(frozen=True)
class Fault:
    """A record that cannot be used.

    `where` is "<path>:<line or row>". `cause` is one of not_utf8, malformed_json, not_an_object, missing_field, wrong_type, surrogate,
    empty_prompt, empty_response, empty_answer, bad_chat.
    """

    where: str
    cause: str
    message: str

    def __str__(self) -> str:
        return f"{self.where}: {self.message}"


class Unreadable(ValueError):
    """Why a record cannot be made; `cause` as in Fault."""

    def __init__(self, cause: str, message: str):
        # Names of columns may hold halves of surrogate pairs, which neither a terminal nor a file takes.
        super().__init__(message.encode("utf-8", "backslashreplace").decode())
        self.cause = cause


def make_record(value: dict[str, Any], identity: str, columns: Columns, need: Collection[str]) -> Record:
    """The record of one object.

    Args:
        value: the object as JSON or a table has it.
        identity: the record's id where the object has none of its own.
        columns: where its fields lie.
        need: what it must have beside the prompt: "response", "answer" or both. A chat has a response where it ends with an assistant's
            turn. A field that is not needed is read where it is well-formed and is None otherwise.
    Raises:
        Unreadable: a needed field is missing, empty or not text. An answer may also be a number.
    """
    own = value.get("id")
    if isinstance(own, (str, int)) and not isinstance(own, bool) and own != "":
        identity = str(own)
        _refuse_surrogates(identity, "field 'id'")
    answer = _text(value, "answer", columns.answer, needed="answer" in need)
    if columns.messages is not None:
        return Record(identity, answer=answer, messages=_chat(value, columns.messages, need))
    return Record(
        identity,
        _text(value, "prompt", columns.prompt, needed=True),
        _text(value, "response", columns.response, needed="response" in need),
        answer,
    )


def _text(value: dict[str, Any], name: str, path: str, *, needed: bool) -> str | None:
    try:
        return _checked_text(value, name, path)
    except Unreadable:
        if needed:
            raise
    return None


def _checked_text(value: dict[str, Any], name: str, path: str) -> str:
    try:
        content = look_up(value, path)
    except Missing as missing:
        raise Unreadable("missing_field", str(missing)) from None
    numbers = name == "answer"
    if numbers and _is_number(content):
        content = str(content)
    if not isinstance(content, str):
        raise Unreadable(
            "wrong_type", f"field {path!r}: expected a string{' or a number' if numbers else ''}, got {kind(content)}"
        )
    if not content.strip():
        raise Unreadable(f"empty_{name}", f"field {path!r} is empty")
    _refuse_surrogates(content, f"field {path!r}")
    return content


def _is_number(content: Any) -> bool:
    if isinstance(content, bool) or not isinstance(content, (int, float, Decimal)):
        return False
    return math.isfinite(content)


def _chat(value: dict[str, Any], path: str, need: Collection[str]) -> tuple[Message, ...]:
    try:
        turns = look_up(value, path)
    except Missing as missing:
        raise Unreadable("missing_field", str(missing)) from None
    if not isinstance(turns, list):
        raise Unreadable("wrong_type", f"field {path!r}: expected a list of messages, got {kind(turns)}")
    messages = tuple(_message(turn, f"field {path!r}, message {number}") for number, turn in enumerate(turns, start=1))
    ends_with_assistant = bool(messages) and messages[-1].role == "assistant"
    asked = messages[:-1] if ends_with_assistant else messages
    if not any(message.content.strip() for message in asked):
        raise Unreadable("empty_prompt", f"field {path!r}: nothing is asked before the assistant's last turn")
    if "response" in need and not ends_with_assistant:
        raise Unreadable(
            "bad_chat", f"field {path!r}: the chat ends with a turn of role {messages[-1].role!r}; expected 'assistant'"
        )
    if "response" in need and not messages[-1].content.strip():
        raise Unreadable("empty_response", f"field {path!r}: the assistant's last turn is empty")
    return messages


def _message(turn: Any, name: str) -> Message:
    if not isinstance(turn, dict):
        raise Unreadable("bad_chat", f"{name}: expected an object with role and content, got {kind(turn)}")
    role, content = turn.get("role"), turn.get("content")
    if role not in ROLES:
        raise Unreadable("bad_chat", f"{name}: expected a role of {', '.join(ROLES)}, got {role!r}")
    if not isinstance(content, str):
        raise Unreadable("bad_chat", f"{name}: expected a string as content, got {kind(content)}")
    _refuse_surrogates(content, name)
    return Message(role, content)


def _refuse_surrogates(text: str, name: str) -> None:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise Unreadable(
            "surrogate", f"{name} holds half of a surrogate pair (\\ud800 to \\udfff), which is no text"
        ) from None
