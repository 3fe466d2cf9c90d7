"""The chat template of a checkpoint: from messages to the text that its model was trained to read.

Templates are rendered as transformers' `apply_chat_template` does (the same Jinja sandbox, extensions, filters and
variables; the tests compare them) without importing transformers, which takes seconds in every worker process.

One difference is intended: templates do not get `strftime_now`. Templates of the Llama 3.2 kind write today's date into
the system turn, so a run's data would depend on the day it was made on, and the prompts that RL samples from would
change at midnight. Such templates ask whether the function exists and fall back to a fixed date. A template that does
not ask cannot be used, and the error says so.
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
from pctrain.hf.directory import CHAT_TEMPLATE, TOKENIZER_CONFIG
from pctrain.hf.tokenizer import read_tokenizer_config, special_tokens


class RenderError(ValueError):
    """A template that cannot write some messages, or refuses them."""


class ChatTemplate:
    """A compiled template with the special tokens that it may name (`bos_token`, `eos_token`, ...)."""

    def __init__(self, source: str, special_tokens: Mapping[str, str], where: str) -> None:
        """Compile a template. `where` names its file in messages.

        Raises:
            UserError: the source is not Jinja; the message has the line.
        """
        self.source = source
        self.special_tokens = dict(special_tokens)
        self.where = where
        try:
            self._template = _environment().from_string(source)
        except jinja2.TemplateSyntaxError as error:
            raise UserError(
                f"{where}: the chat template is broken at line {error.lineno}: {error.message}; "
                "fix it, or give another one by data.template"
            ) from None
        except (RecursionError, SyntaxError) as error:  # Jinja compiles to Python, which has its own limits
            raise UserError(
                f"{where}: the chat template cannot be compiled, most likely because it nests too deeply ({error}); "
                "simplify it, or give another one by data.template"
            ) from None

    @cached_property
    def digest(self) -> str:
        """sha256 of the template and its special tokens, in hex."""
        return hashlib.sha256(json.dumps([self.source, self.special_tokens], sort_keys=True).encode()).hexdigest()

    def render(self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool = False) -> str:
        """Return the text of `messages`, [{role, content}, ...].

        Args:
            messages: the turns of a conversation.
            add_generation_prompt: append the head of an assistant's turn, for a model to continue.
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
            text.encode()  # raises for half of a surrogate pair ("\ud83d" in the template), which no tokenizer takes
            return text
        except jinja2.UndefinedError as error:
            advice = _NO_DATE if "strftime_now" in str(error.message) else ""
            raise RenderError(
                f"{self.where}: the chat template uses a variable that it does not get: {error.message}{advice}"
            ) from None
        except jinja2.TemplateError as error:
            raise RenderError(f"{self.where}: the chat template refuses the messages: {error.message}") from None
        except Exception as error:  # a template is a program: adding None to text, a missing key of a dict, ...
            raise RenderError(f"{self.where}: the chat template fails: {type(error).__name__}: {error}") from None


_NO_DATE = (
    "; today's date would make the data depend on the day: replace strftime_now by a fixed date in a copy of the "
    "template, and give that copy by data.template"
)


def load(hf_dir: Path, setting: str) -> ChatTemplate | None:
    """Return the template that `data.template` asks for, or None if tokens are put together without one.

    Args:
        hf_dir: the Hugging Face directory.
        setting: "auto", "none", or the path of a Jinja file. "auto" takes `chat_template.jinja` of the directory, else
            `chat_template` of its tokenizer_config.json (of several the one named "default"), else no template.
    Raises:
        UserError: a file is missing, not UTF-8 or not Jinja, or there are several templates without a default.
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
        return ChatTemplate(_read(path), special_tokens(hf_dir), str(path))
    file = hf_dir / CHAT_TEMPLATE
    if file.is_file():  # the file takes precedence over the config, as in transformers
        return ChatTemplate(_read(file), special_tokens(hf_dir), str(file))
    config = hf_dir / TOKENIZER_CONFIG
    source = _from_config(read_tokenizer_config(hf_dir).get("chat_template"), config)
    return None if source is None else ChatTemplate(source, special_tokens(hf_dir), f"{config}, chat_template")


def _from_config(entry: Any, config: Path) -> str | None:
    """Return the template under `chat_template`, which is text or a list of named templates."""
    if isinstance(entry, list):
        templates = {str(item.get("name")): item.get("template") for item in entry if isinstance(item, dict)}
        if "default" not in templates:
            raise UserError(
                f"{config}: chat_template lists {', '.join(templates) or 'no templates'}, but none is named 'default'; "
                "write the one to use into a file, and give that file by data.template"
            )
        entry = templates["default"]
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


def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    return environment


class _Generation(jinja2.ext.Extension):
    """A pass-through for `{% generation %}` ... `{% endgeneration %}`, which mark what an assistant writes.

    The spans that are trained on come from the generation prompt, which RL samples after, and not from these marks.
    """

    tags = {"generation"}  # noqa: RUF012 (Jinja declares it as an instance variable)

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        """Parse a block as if its tags were not there."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return [jinja2.nodes.Scope(body, lineno=line)]


def _tojson(
    value: Any, ensure_ascii: bool = False, indent: int | None = None, separators: Any = None, sort_keys: bool = False
) -> str:
    """Return JSON text. Jinja's own filter would escape < and > for HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)
