"""Which columns of a file are the prompt, the response, the answer: `data.fields`, and what is found where it says nothing."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

from pctrain.common.errors import UserError
from pctrain.config.tree import FieldsConfig

Form = Literal["chat", "RETU", "plain"]
# The columns of each form. RETU publishes verl's: `prompt` there is a chat of one turn made for its rollouts, the question as such lies
# in `extra_info` beside the expert's trajectory.
FORMS: dict[Form, dict[str, str]] = {
    "chat": {"messages": "messages", "answer": "answer"},
    "RETU": {"prompt": "extra_info.question", "response": "extra_info.answer", "answer": "reward_model.ground_truth"},
    "plain": {"prompt": "prompt", "response": "response", "answer": "answer"},
}


class Missing(LookupError):
    """A column that a record does not have; the message says what is there."""


@dataclass(frozen=True)
class Columns:
    """The dotted paths that one file is read by. A chat has `messages`; any other record has `prompt` and `response`."""

    form: Form
    prompt: str | None
    response: str | None
    answer: str
    messages: str | None

    def describe(self) -> str:
        """`RETU: prompt from extra_info.question, response from extra_info.answer, ...`."""
        chosen = {name: getattr(self, name) for name in ("messages", "prompt", "response", "answer")}
        return f"{self.form}: " + ", ".join(f"{name} from {path}" for name, path in chosen.items() if path is not None)

    @property
    def paths(self) -> list[str]:
        """Every path that a record is read from, its own `id` among them."""
        return ["id", *(path for path in (self.prompt, self.response, self.answer, self.messages) if path is not None)]


def form_of(value: dict[str, Any]) -> Form:
    """The form that a record has the columns of."""
    if isinstance(value.get("messages"), list):
        return "chat"
    extra = value.get("extra_info")
    return "RETU" if isinstance(extra, dict) and "question" in extra else "plain"


def choose(fields: FieldsConfig, found: Form) -> Columns:
    """The columns of a file whose first record has the form `found`. What `fields` names goes over it.

    Raises:
        UserError: `fields` names a chat and also a prompt or a response.
    """
    named = {
        name: path
        for name in ("prompt", "response", "answer", "messages")
        if (path := getattr(fields, name)) is not None
    }
    parts = sorted({"prompt", "response"} & named.keys())
    if "messages" in named and parts:
        raise UserError(
            f"data.fields.messages = {fields.messages} and data.fields.{parts[0]} = {named[parts[0]]}: a record is a chat or a "
            "prompt with its response; leave one of the two out"
        )
    if "messages" in named:
        found = "chat"
    elif parts and found == "chat":
        found = "plain"
    columns = {"prompt": None, "response": None, "messages": None, **FORMS[found], **named}
    return Columns(form=found, **columns)


def look_up(value: dict[str, Any], path: str) -> Any:
    """What lies at a dotted path: a dot goes into an object, a number into a list. A column whose own name has the dots comes first.

    Raises:
        Missing: nothing lies there.
    """
    if path in value:
        return value[path]
    here: Any = value
    steps = path.split(".")
    for depth, step in enumerate(steps):
        if isinstance(here, dict) and step in here:
            here = here[step]
        elif isinstance(here, list) and step.isdecimal() and len(step) < 10 and int(step) < len(here):
            here = here[int(step)]
        else:
            raise Missing(f"the record has no field {path!r} ({_what_is_there(here, '.'.join(steps[:depth]))})")
    return here


def _what_is_there(here: Any, at: str) -> str:
    owner = f"{at!r}" if at else "it"
    if isinstance(here, dict):
        return f"{owner} has: {', '.join(sorted(map(str, here))) or 'none'}"
    return f"{owner} is a list of {len(here)}" if isinstance(here, list) else f"{owner} is {kind(here)}"


def kind(value: Any) -> str:
    """`a list`, `a number`, `null`, ...: what a JSON value is, for messages."""
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
    return "null" if value is None else kinds.get(type(value), f"a value of type {type(value).__name__}")
