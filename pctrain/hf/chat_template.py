"""The chat template of a checkpoint: messages to the text that its model was trained to read.

Rendered as transformers' `apply_chat_template` does (the same Jinja sandbox, extensions, filters and variables; checked by the tests)
without importing it, which takes seconds in every worker process.

What differs on purpose: `strftime_now` is not given. Templates of the Llama 3.2 kind write today's date into the system turn, so a run's
data would depend on the day it was made on, and the prompts that RL samples from would change at midnight. Such templates ask whether the
function is there and fall back to a fixed date; one that does not ask cannot be used, and says so.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from pctrain.common.errors import UserError
from pctrain.hf.tokenizer import read_json


class RenderError(ValueError):
    """The template cannot write these messages, or refuses them."""


class ChatTemplate:
    """A compiled template and the special tokens it may name (`bos_token`, `eos_token`, ...)."""

    def __init__(self, source: str, special_tokens: Mapping[str, str], where: str):
        """`where` names the file in messages. Raises UserError for a template that is no Jinja, with its line."""
        self.source, self.special_tokens, self.where = source, dict(special_tokens), where
        try:
            self._template = _environment().from_string(source)
        except jinja2.TemplateSyntaxError as error:
            raise UserError(
                f"{where}: the chat template is broken at line {error.lineno}: {error.message}; "
                "mend it, or give another by data.template"
            ) from None
        except (
            RecursionError,
            SyntaxError,
        ) as error:  # a template becomes a Python program, which has bounds of its own
            raise UserError(
                f"{where}: the chat template cannot be compiled, most likely for what is nested in it ({error}); "
                "simplify it, or give another by data.template"
            ) from None

    @cached_property
    def digest(self) -> str:
        """sha256 of the template and its special tokens, in hex."""
        return hashlib.sha256(json.dumps([self.source, self.special_tokens], sort_keys=True).encode()).hexdigest()

    def render(self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool = False) -> str:
        """The text of `messages`, [{role, content}, ...].

        Args:
            add_generation_prompt: whether the head of an assistant's turn follows, from which a model goes on.
        Raises:
            RenderError: the template refuses the messages (`raise_exception`) or fails.
        """
        try:
            text = self._template.render(
                messages=list(messages),
                tools=None,
                documents=None,
                add_generation_prompt=add_generation_prompt,
                **self.special_tokens,
            )
            text.encode()  # half of a surrogate pair ("\ud83d" in the template) is no text for a tokenizer
            return text
        except jinja2.UndefinedError as error:
            raise RenderError(
                f"{self.where}: the chat template uses what it is not given: {error.message}"
                + (_NO_DATE if "strftime_now" in str(error.message) else "")
            ) from None
        except jinja2.TemplateError as error:
            raise RenderError(f"{self.where}: the chat template refuses the messages: {error.message}") from None
        except Exception as error:  # a template is a program: adding None to text, a missing key of a dict, ...
            raise RenderError(f"{self.where}: the chat template fails: {type(error).__name__}: {error}") from None


_NO_DATE = (
    "; the date of today would make the data depend on the day: replace strftime_now by a fixed date in a copy of the template, "
    "and name that by data.template"
)


def load(hf_dir: Path, setting: str) -> ChatTemplate | None:
    """The template that `data.template` asks for; None: tokens are put together without one.

    Args:
        setting: "auto": `chat_template.jinja` of the directory or, where there is none, `chat_template` of its tokenizer_config.json (of
            several the one named "default"), or no template where it has neither; "none"; or the path of a Jinja file.
    Raises:
        UserError: a file that is missing, not UTF-8 or no Jinja; several templates without a default.
    """
    hf_dir = Path(hf_dir)
    if setting == "none":
        return None
    if setting != "auto":
        path = Path(setting)
        if not path.is_file():
            raise UserError(
                f"data.template: the file {path} does not exist; expected auto, none, or the path of a Jinja file"
            )
        return ChatTemplate(_read(path), _special_tokens(hf_dir), str(path))
    beside = hf_dir / "chat_template.jinja"
    if beside.is_file():  # it goes before the config, as in transformers
        return ChatTemplate(_read(beside), _special_tokens(hf_dir), str(beside))
    config = hf_dir / "tokenizer_config.json"
    source = _of_config(read_json(config).get("chat_template"), config)
    return None if source is None else ChatTemplate(source, _special_tokens(hf_dir), f"{config}, chat_template")


def _of_config(entry: Any, config: Path) -> str | None:
    if isinstance(entry, list):
        named = {str(item.get("name")): item.get("template") for item in entry if isinstance(item, dict)}
        if "default" not in named:
            raise UserError(
                f"{config}: chat_template lists {', '.join(map(str, named)) or 'no templates'}, but none is named 'default'; "
                "write the one to use into a file, and name that by data.template"
            )
        entry = named["default"]
    if entry is not None and not isinstance(entry, str):
        raise UserError(
            f"{config}: chat_template: expected text, or a list of {{name, template}}; give another by data.template"
        )
    return entry


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: the chat template cannot be read: {error}") from None


def _special_tokens(hf_dir: Path) -> dict[str, str]:
    """{"bos_token": "<s>", ...}: what tokenizer_config.json names. special_tokens_map.json, the older form, goes before it where the
    config does not list the added tokens: transformers' rule."""
    config = read_json(hf_dir / "tokenizer_config.json")
    entries = config if "added_tokens_decoder" in config else config | read_json(hf_dir / "special_tokens_map.json")
    texts = {
        key: value.get("content") if isinstance(value, dict) else value
        for key, value in entries.items()
        if key.endswith("_token")
    }
    return {key: text for key, text in sorted(texts.items()) if isinstance(text, str)}


def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    return environment


class _Generation(jinja2.ext.Extension):
    """`{% generation %}` ... `{% endgeneration %}`, by which some templates mark what the assistant writes: passed through.

    The spans that are trained on come from the generation prompt, which is what RL samples after, and not from these marks.
    """

    tags = {"generation"}

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return [jinja2.nodes.Scope(body, lineno=line)]


def _tojson(
    value: Any, ensure_ascii: bool = False, indent: int | None = None, separators: Any = None, sort_keys: bool = False
) -> str:
    """Jinja's own filter would escape < and > for HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)
