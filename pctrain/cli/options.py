"""Commands with options of their own: `FILE... --name=value`, next to the keys of the config tree (`--section.key=value`).

A command's options are a class (a `Section`): its fields give names, types, ranges, descriptions and defaults, for reading them and for
`--help`. Whatever is not one of them is a key of the config, or a mistake.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from typing import Any, TypeVar, get_args, get_origin

from pydantic import ValidationError

from pctrain.cli.arguments import Command, resolve_config
from pctrain.common.errors import UserError
from pctrain.config.tree import Config, Section

Options = TypeVar("Options", bound=Section)


def parse(command: Command, arguments: list[str], kind: type[Options]) -> tuple[list[str], Options, list[str]]:
    """The operands, the command's own options, and the arguments that are left for `resolve_config`.

    Raises:
        UserError: an option that is neither the command's nor a key of the config (with the nearest name), a missing or an ill-typed value.
    """
    operands, given, rest = [], {}, []
    for name, value in _tokens(
        arguments, flags={name for name, field in kind.model_fields.items() if field.annotation is bool}
    ):
        if (
            name is not None and name.replace("-", "_") in kind.model_fields
        ):  # --debug-rollout-only is debug_rollout_only
            name = name.replace("-", "_")
        if name is None:
            operands.append(value)
        elif name in kind.model_fields:
            _add(command, given, name, value, _is_list(kind, name))
        elif name == "config" or name.split(".")[0] in Config.model_fields:
            rest += [f"--{name}"] if value is None else [f"--{name}={value}"]
        else:
            raise UserError(_unknown(command, name, kind))
    return operands, _checked(command, given, kind), rest


def parse_with_config(command: Command, arguments: list[str], kind: type[Options]) -> tuple[list[str], Options, Config]:
    """As `parse`, with the config that the other arguments make. UserError also where there is no operand."""
    operands, options, rest = parse(command, arguments, kind)
    if not operands:
        raise UserError(f"pctrain {command.name}: expected one or more files; usage: {command.usage}")
    return operands, options, resolve_config(command, rest)


def _tokens(arguments: list[str], flags: set[str]) -> Iterator[tuple[str | None, str | None]]:
    """(name, value) of `--name=value` and `--name value`; (name, None) without a value, (None, text) for an operand.

    A switch takes its value after `=` alone, or none: what follows may be a file.
    """
    rest = list(arguments)
    while rest:
        token = rest.pop(0)
        if not token.startswith("--") or token == "--":
            if token.startswith("-"):
                raise UserError(
                    f"unexpected argument {token!r}: options have the form --name=value; a file of that name is ./{token}"
                )
            yield None, token
            continue
        name, equals, text = token[2:].partition("=")
        if equals:
            yield name, text
        elif name.replace("-", "_") in flags:
            yield name, "true"
        else:
            yield name, rest.pop(0) if rest and not rest[0].startswith("--") else None


def _add(command: Command, given: dict[str, Any], name: str, value: str | None, is_list: bool) -> None:
    if not value:
        raise UserError(f"pctrain {command.name}: --{name} needs a value: --{name}=VALUE")
    if is_list:
        given.setdefault(name, []).append(value)
    elif name in given:
        raise UserError(f"pctrain {command.name}: --{name} is given more than once: {given[name]}, {value}")
    else:
        given[name] = value


def _is_list(kind: type[Section], name: str) -> bool:
    return get_origin(kind.model_fields[name].annotation) is list


def _checked(command: Command, given: dict[str, Any], kind: type[Options]) -> Options:
    for name, values in given.items():
        if isinstance(values, list) and get_args(kind.model_fields[name].annotation)[0] in (int, float):
            given[name] = [part.strip() for value in values for part in value.split(",")]  # --seeds=0,1,2
    try:
        return kind.model_validate(given)
    except ValidationError as error:
        raise UserError("\n".join(_problem(command, item) for item in error.errors(include_url=False))) from None


def _problem(command: Command, item: Any) -> str:
    name = item["loc"][0]
    if item["type"] == "missing":
        return f"pctrain {command.name} needs --{name}; usage: {command.usage}"
    expected = item["msg"].removeprefix("Input should be ").partition(", unable to")[0]
    return f"pctrain {command.name}: --{name}: expected {expected}, got {str(item['input'])!r}"


def _unknown(command: Command, name: str, kind: type[Section]) -> str:
    near = difflib.get_close_matches(name.replace("-", "_"), [*kind.model_fields, "config"], n=1, cutoff=0.6)
    hint = (
        f"did you mean --{near[0]}?"
        if near
        else f"its options are: {', '.join(f'--{known}' for known in kind.model_fields)}"
    )
    return f"pctrain {command.name}: unknown option --{name}; {hint}"
