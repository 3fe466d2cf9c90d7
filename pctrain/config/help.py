"""Help texts of options: name, type, range, description with unit, default. Also writes docs/config.md."""

from __future__ import annotations

import shutil
import textwrap
import types
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import annotated_types
from pydantic.fields import FieldInfo

from pctrain.config.algorithm import AlgorithmOptions, built_in
from pctrain.config.keys import algorithm_options, algorithms_with
from pctrain.config.tree import BenchmarkOrPath, Config, Section, Sources

ALGORITHM = "rl.algorithm"
_LARGEST_BOUND = 2**62  # a bound of the integer type says nothing to a reader
_NO_DEFAULT = ("[default: null]", "[default: []]", "[default: {}]")  # the description says what happens instead


@dataclass(frozen=True)
class _Option:
    """An option as it is printed."""

    key: str
    field: FieldInfo
    default: str

    @property
    def description(self) -> str:
        limits = _limits(self.field)
        return f"{self.field.description}{f' ({limits})' if limits else ''}"

    @property
    def kind(self) -> str:
        return describe_type(self.field.annotation)


class _Switch(_Option):
    """An option that is typed without a value."""

    @property
    def kind(self) -> str:
        return ""


class _Repeated(_Option):
    """An option that is typed once for each of its values."""

    @property
    def kind(self) -> str:
        return f"{describe_type(get_args(self.field.annotation)[0])} ..."


def option_lines(prefixes: Sequence[str]) -> list[str]:
    """Return the help of every option below the prefixes (sections, parts of them, or single options)."""
    lines: list[str] = []
    for name in Config.model_fields:
        section = getattr(Config(), name)
        options = [option for option in _options(section, name) if _is_below(option.key, prefixes)]
        if options:
            lines += ["", f"{name}: {_summary(type(section))}".rstrip()]
        for option in options:
            lines += _lines(option)
        if name == "rl" and _is_below(ALGORITHM, prefixes):
            for title, group in _algorithm_groups():
                lines += ["", title]
                for option in group:
                    lines += _lines(option)
    return lines[1:]


def own_option_lines(own: type[Section]) -> list[str]:
    """Return the help of a command's own options, the fields of `own`. A switch, off by default, shows no value."""
    lines: list[str] = []
    for name, field in own.model_fields.items():
        key = name.replace("_", "-")
        if field.default is False:
            lines += _lines(_Switch(key, field, "[default: null]"))
            continue
        default = None if field.is_required() else _shown(field.get_default(call_default_factory=True))
        option = _Repeated if get_origin(field.annotation) is list else _Option
        lines += _lines(option(key, field, "[required]" if default is None else f"[default: {default}]"))
    return lines


def reference() -> str:
    """Return docs/config.md, a table of options per section.

    `python -m pctrain.config.help > docs/config.md` writes it again.
    """
    parts = [
        "# Options",
        "This page lists every config key. Set keys in a YAML file (`--config`) as a tree, or override them on the "
        "command\n"
        "line as `--section.key=value`. The key `base: FILE` of a file names one or several files that it overrides.\n"
        "It is generated from the types in `pctrain/config/` by `python -m pctrain.config.help > docs/config.md`.",
    ]
    for name in Config.model_fields:
        section = getattr(Config(), name)
        parts += [f"## {name}", *filter(None, [_summary(type(section))]), _table(_options(section, name))]
        if name == "rl":
            parts += ["### rl.algorithm", _ALGORITHM_NOTE]
            for title, group in _algorithm_groups():
                parts += [title, _table(group)]
    return "\n\n".join(parts) + "\n"


_ALGORITHM_NOTE = (
    "Each algorithm has its own options: `rl: {algorithm: {name: upt, gamma: 2}}` in a file, `--rl.algorithm=upt\n"
    "--rl.algorithm.gamma=2` on the command line. An option that an algorithm does not have is an error."
)


def _table(options: Sequence[_Option] | Iterator[_Option]) -> str:
    rows = ["| key | type | default | |", "|---|---|---|---|"]
    for option in options:
        default = option.default.removeprefix("[default: ").removesuffix("]")
        cells = [f"`{option.key}`", option.kind, default, option.description]
        rows.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(rows)


def help_width() -> int:
    """Return the columns that help texts are wrapped to: those of the terminal, within bounds."""
    return max(72, min(shutil.get_terminal_size((120, 24)).columns, 140))


def _lines(option: _Option) -> list[str]:
    indent = " " * 8
    default = "" if option.default in _NO_DEFAULT else f"  {option.default}"
    wrapped = textwrap.wrap(option.description + default, help_width(), initial_indent=indent, subsequent_indent=indent)
    return [f"  --{option.key} {option.kind}".rstrip(), *wrapped]


# ---- options of the tree ---------------------------------------------------------------------------------------------


def _options(section: Section, prefix: str) -> Iterator[_Option]:
    for name, field in type(section).model_fields.items():
        value, key = getattr(section, name), f"{prefix}.{name}"
        if isinstance(value, AlgorithmOptions):
            yield _Option(key, field, f"[default: {value.name}]")
        elif isinstance(value, Section):
            yield from _options(value, key)
        else:
            yield _Option(key, field, f"[default: {_shown(value)}]")


def _algorithm_groups() -> Iterator[tuple[str, list[_Option]]]:
    """Yield (title, options), with one group for all options that the same algorithms have."""

    def owners(option: str) -> tuple[str, ...]:
        return tuple(algorithms_with(option))

    in_order = sorted(algorithm_options(), key=lambda option: -len(owners(option)))
    for names, group in groupby(in_order, key=owners):
        of_all = len(names) == len(built_in())
        title = f"Options of {'every algorithm' if of_all else ', '.join(names)}:"
        yield title, [_algorithm_option(option, names) for option in group]


def _algorithm_option(option: str, names: Sequence[str]) -> _Option:
    """Return an option with the default of most algorithms, and of each that differs."""
    defaults = {name: _shown(built_in()[name].model_fields[option].get_default()) for name in names}
    usual = max(defaults.values(), key=list(defaults.values()).count)
    others = "".join(f"; {name}: {value}" for name, value in defaults.items() if value != usual)
    return _Option(f"{ALGORITHM}.{option}", algorithm_options()[option], f"[default: {usual}{others}]")


def _is_below(key: str, prefixes: Sequence[str]) -> bool:
    return any(f"{key}.".startswith(f"{prefix}.") for prefix in prefixes)


# ---- texts -----------------------------------------------------------------------------------------------------------


def describe_type(annotation: Any) -> str:
    """Return INT, FLOAT, PATH, TEXT, true|false, the words of a choice, or a list of one of these."""
    if annotation is Sources:
        return "PATH or [{path, weight, name}, ...]"
    if annotation is BenchmarkOrPath:
        return "PATH or {path, samples, verifier, instruction, fields}"
    if isinstance(annotation, type) and issubclass(annotation, AlgorithmOptions):
        return "NAME or {name: NAME, OPTION: VALUE, ...}"
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return "{key: value, ...}"
    describe = _GENERIC.get(get_origin(annotation))
    if describe is not None:
        return describe(get_args(annotation))
    return {int: "INT", float: "FLOAT", bool: "true|false", str: "TEXT", Path: "PATH"}[annotation]


_GENERIC: dict[Any, Callable[[tuple[Any, ...]], str]] = {
    Annotated: lambda parts: describe_type(parts[0]),
    dict: lambda parts: f"{{NAME: {describe_type(parts[1])}, ...}}",
    list: lambda parts: f"[{describe_type(parts[0])}, ...]",
    tuple: lambda parts: f"[{', '.join(map(describe_type, parts))}]",
    Literal: lambda words: "|".join(map(str, words)),
    Union: lambda parts: _describe_union(parts),
    types.UnionType: lambda parts: _describe_union(parts),
}


def _describe_union(parts: tuple[Any, ...]) -> str:
    return " or ".join(describe_type(part) for part in parts if part is not type(None))


def _summary(section: type[Section]) -> str:
    doc = section.__doc__ or ""
    return " ".join(doc.split()) if doc != Section.__doc__ else ""


def _limits(field: FieldInfo) -> str:
    signs = {annotated_types.Ge: ">=", annotated_types.Gt: ">", annotated_types.Le: "<=", annotated_types.Lt: "<"}
    # The bound is the attribute with the rule's name: Ge.ge, Lt.lt.
    bounds = [
        (signs[type(rule)], getattr(rule, type(rule).__name__.lower()))
        for rule in field.metadata
        if type(rule) in signs and getattr(rule, type(rule).__name__.lower()) < _LARGEST_BOUND
    ]
    return ", ".join(f"{sign} {bound:g}" for sign, bound in bounds)


def _shown(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list):
        return f"[{', '.join(str(item) for item in value)}]"
    return str(value)


if __name__ == "__main__":
    print(reference(), end="")
