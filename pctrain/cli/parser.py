"""The one parser of the command line: argparse with an option for each config key, which only collects raw text.

Types, ranges and error messages of config keys belong to `config.load`, because a YAML file has the same keys. A
command's own options are the fields of a class, which checks their values.
"""

from __future__ import annotations

import argparse
import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn, get_args, get_origin

from pydantic import ValidationError
from pydantic.fields import FieldInfo

from pctrain.cli.command import Call, Command, Options
from pctrain.common.errors import UserError
from pctrain.config.help import describe_type
from pctrain.config.keys import ALGORITHM, iter_keys, unknown_key
from pctrain.config.tree import Config, Section

CONFIG = "config"


def parse(command: Command[Options], arguments: Sequence[str]) -> Call[Options] | None:
    """Sort the arguments of a command. Return None if they ask for help.

    Options may come before, between or after operands. An option takes its value after `=` or as the next argument. A
    switch (a true|false option of the command itself) takes it only after `=`: the next argument may be an operand.

    Raises:
        UserError: an unknown option (with the nearest name), a missing, repeated or wrong value, or a wrong number of
            operands.
    """
    parser = _Parser(prog=f"pctrain {command.name}", add_help=False, allow_abbrev=False)
    add_options(parser, command)
    if command.options:
        _add_own_algorithm_options(parser, arguments)
    switches = {
        text
        for name, field in command.own.model_fields.items()
        if field.annotation is bool
        for text in _spellings(name)
    }
    typed = [f"{argument}=true" if argument in switches else argument for argument in arguments]
    parsed, others = parser.parse_known_args(typed, argparse.Namespace(given=[]))
    if parsed.help:
        return None
    for argument in others:
        if argument.startswith("-"):
            raise UserError(_unknown_option(command, argument))
    own: dict[str, Any] = {}
    settings = []
    for name, text in parsed.given:
        if name != CONFIG and name not in command.own.model_fields:
            if text is None:
                raise UserError(f"--{name} needs a value: --{name}=VALUE")
            settings.append(f"--{name}={text}")
        else:
            _add_own(command, own, name, text)
    file = own.pop(CONFIG, None)
    options = _check_options(command, own)
    command.operands.check(command, others)
    return Call(command, list(arguments), others, options, None if file is None else Path(file), settings)


def add_options(parser: argparse.ArgumentParser, command: Command[Any]) -> None:
    """Add every option of a command: `--help`, its own, and if it reads the config `--config` and one for each key."""
    parser.add_argument("-h", "--help", action="store_true", help="show the options and their defaults")
    for name, field in command.own.model_fields.items():
        _add_option(parser, name, field, *_spellings(name))
    if command.options:
        _add_option(parser, CONFIG, None, f"--{CONFIG}")
        for key, config_field in iter_keys():
            _add_option(parser, key, config_field, f"--{key}")


def _add_own_algorithm_options(parser: argparse.ArgumentParser, arguments: Sequence[str]) -> None:
    """Add the options of a user's algorithm, which are known only once its module is imported: accept what is typed."""
    known = {key for key, _ in iter_keys()}
    prefix = f"--{'.'.join(ALGORITHM)}."
    typed = {argument[2:].partition("=")[0] for argument in arguments if argument.startswith(prefix)}
    for key in sorted(typed - known):
        _add_option(parser, key, None, f"--{key}")


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{self.prog}: {message}")


class _Collect(argparse.Action):
    """Append (name, text) to `given`, so that the order stays and repetitions are seen. A missing value is None."""

    def __call__(
        self, parser: Any, namespace: argparse.Namespace, values: Any, option_string: str | None = None
    ) -> None:
        namespace.given.append((self.dest, values))


def _add_option(parser: argparse.ArgumentParser, name: str, field: FieldInfo | None, *spellings: str) -> None:
    text = "YAML file with config keys" if field is None else field.description or ""
    kind = "FILE" if field is None else describe_type(field.annotation)
    parser.add_argument(
        *spellings,
        dest=name,
        action=_Collect,
        nargs="?",
        default=argparse.SUPPRESS,
        metavar=kind,
        help=text.replace("%", "%%"),
    )


def _spellings(name: str) -> list[str]:
    """Return the ways to type an option: `--dry_run` and `--dry-run`."""
    return list(dict.fromkeys([f"--{name}", _dashed(name)]))


def _dashed(name: str) -> str:
    """Return the way that help and messages write a command's own option: `--dry-run`."""
    return f"--{name.replace('_', '-')}"


# ---- a command's own options ----------------------------------------------------------------------------------


def _add_own(command: Command[Any], own: dict[str, Any], name: str, text: str | None) -> None:
    if not text:
        raise UserError(f"pctrain {command.name}: {_dashed(name)} needs a value: {_dashed(name)}=VALUE")
    if _is_list(command.own, name):
        own.setdefault(name, []).append(text)
    elif name in own:
        raise UserError(f"pctrain {command.name}: {_dashed(name)} is given more than once: {own[name]}, {text}")
    else:
        own[name] = text


def _is_list(own: type[Section], name: str) -> bool:
    return name != CONFIG and get_origin(own.model_fields[name].annotation) is list


def _check_options(command: Command[Options], own: dict[str, Any]) -> Options:
    for name, values in own.items():
        if isinstance(values, list) and get_args(command.own.model_fields[name].annotation)[0] in (int, float):
            own[name] = [part.strip() for value in values for part in value.split(",")]  # --seeds=0,1,2
    try:
        return command.own.model_validate(own)
    except ValidationError as error:
        raise UserError("\n".join(_value_error(command, item) for item in error.errors(include_url=False))) from None


def _value_error(command: Command[Any], item: Any) -> str:
    name = item["loc"][0]
    if item["type"] == "missing":
        field = command.own.model_fields[name]
        return (
            f"pctrain {command.name} needs {_dashed(name)} {describe_type(field.annotation)} ({field.description}); "
            f"usage: {command.usage}"
        )
    expected = item["msg"].removeprefix("Input should be ").partition(", unable to")[0]
    return f"pctrain {command.name}: {_dashed(name)}: expected {expected}, got {str(item['input'])!r}"


def _unknown_option(command: Command[Any], argument: str) -> str:
    """Return the message for an argument that begins with a dash and is no option of the command."""
    if not argument.startswith("--") or argument == "--":
        return (
            f"unexpected argument {argument!r}: options have the form --name=value; a file of that name is ./{argument}"
        )
    name = argument[2:].partition("=")[0]
    own = list(command.own.model_fields)
    if command.options and (not own or name.split(".")[0] in Config.model_fields):
        return unknown_key(name, "command line")
    near = difflib.get_close_matches(name.replace("-", "_"), [*own, CONFIG], n=1, cutoff=0.6)
    if near:
        hint = f"did you mean {_dashed(near[0])}?"
    elif own:
        hint = f"its options are: {', '.join(_dashed(known) for known in own)}"
    else:
        hint = f"usage: {command.usage}"
    return f"pctrain {command.name}: unknown option --{name}; {hint}"
