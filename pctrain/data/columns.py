"""The columns of prompt, response and answer: from `data.fields`, or detected from the first record of a file."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

from pctrain.common.errors import UserError
from pctrain.config.tree import FieldsConfig

Form = Literal["chat", "RETU", "plain"]
# The columns of each form. RETU publishes verl's: `prompt` there is a chat of one turn, made for its rollouts. The
# question itself is in `extra_info`, next to the expert's trajectory.
FORMS: dict[Form, dict[str, str]] = {
    "chat": {"messages": "messages", "answer": "answer"},
    "RETU": {"prompt": "extra_info.question", "response": "extra_info.answer", "answer": "reward_model.ground_truth"},
    "plain": {"prompt": "prompt", "response": "response", "answer": "answer"},
}


class MissingField(LookupError):
    """A field that a record does not have. The message lists the fields that it has."""


@dataclass(frozen=True)
class Columns:
    """The dotted paths by which one file is read.

    A chat has `messages`; any other record has `prompt` and `response`.
    """

    form: Form
    prompt: str | None
    response: str | None
    answer: str
    messages: str | None

    def describe(self) -> str:
        """Return a text such as `RETU: prompt from extra_info.question, response from extra_info.answer, ...`."""
        chosen = {name: getattr(self, name) for name in ("messages", "prompt", "response", "answer")}
        return f"{self.form}: " + ", ".join(f"{name} from {path}" for name, path in chosen.items() if path is not None)

    @property
    def paths(self) -> list[str]:
        """Every path that a record is read from, including its own `id`."""
        return ["id", *(path for path in (self.prompt, self.response, self.answer, self.messages) if path is not None)]


def detect_form(value: dict[str, Any]) -> Form:
    """Return the form whose columns a record has."""
    if isinstance(value.get("messages"), list):
        return "chat"
    extra = value.get("extra_info")
    return "RETU" if isinstance(extra, dict) and "question" in extra else "plain"


def choose_columns(fields: FieldsConfig, detected: Form) -> Columns:
    """Return the columns of a file whose first record has the form `detected`. Paths in `fields` take precedence.

    Raises:
        UserError: `fields` names a chat and also a prompt or a response.
    """
    given = {name: getattr(fields, name) for name in ("prompt", "response", "answer", "messages")}
    named = {name: path for name, path in given.items() if path is not None}
    parts = sorted({"prompt", "response"} & named.keys())
    if "messages" in named and parts:
        raise UserError(
            f"data.fields.messages = {fields.messages} and data.fields.{parts[0]} = {named[parts[0]]}: "
            "a record is a chat or a prompt with its response. Remove one of the two keys."
        )
    form = detected
    if "messages" in named:
        form = "chat"
    elif parts and detected == "chat":
        form = "plain"
    paths = FORMS[form] | named
    return Columns(form, paths.get("prompt"), paths.get("response"), paths["answer"], paths.get("messages"))


def look_up(value: dict[str, Any], path: str) -> Any:
    """Return the value at a dotted path: a name selects from an object, a number from a list.

    A column whose own name contains the dots takes precedence.

    Raises:
        MissingField: there is no value at the path.
    """
    if path in value:
        return value[path]
    current: Any = value
    steps = path.split(".")
    for depth, step in enumerate(steps):
        if isinstance(current, dict) and step in current:
            current = current[step]
        elif isinstance(current, list) and step.isdecimal() and len(step) < 10 and int(step) < len(current):
            current = current[int(step)]
        else:
            raise MissingField(f"the record has no field {path!r} ({_describe(current, '.'.join(steps[:depth]))})")
    return current


def _describe(value: Any, path: str) -> str:
    """Return what a record has at a path, for messages."""
    owner = f"{path!r}" if path else "it"
    if isinstance(value, dict):
        return f"{owner} has: {', '.join(sorted(map(str, value))) or 'none'}"
    return f"{owner} is a list of {len(value)}" if isinstance(value, list) else f"{owner} is {json_kind(value)}"


def json_kind(value: Any) -> str:
    """Return the kind of a JSON value for messages: `a list`, `a number`, `null`, ..."""
    if value is None:
        return "null"
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN or an infinity"
    kinds = {
        dict: "an object",
        list: "a list",
        str: "a string",
        bool: "true or false",
        int: "a number",
        float: "a number",
    }
    return kinds.get(type(value), f"a value of type {type(value).__name__}")
