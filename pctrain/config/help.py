"""The options of config.py as the lines of `--help`: name, type, range, description with unit, default."""

from __future__ import annotations

import shutil
import textwrap
import types
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import annotated_types
from pydantic.fields import FieldInfo

from pctrain.config.tree import Benchmark, Config, Section, Sources


def option_lines(prefixes: Sequence[str]) -> list[str]:
    """Every option below the prefixes (a section, a part of one, or one option), wrapped to the width of the terminal."""
    lines = []
    for name in Config.model_fields:
        section = getattr(Config(), name)
        options = [
            o for o in _options(section, name) if any(f"{o[0]}.".startswith(f"{prefix}.") for prefix in prefixes)
        ]
        if options:
            lines += ["", f"{name}: {_summary(type(section))}".rstrip()]
        for key, field, value in options:
            lines += _lines(key, field, f"[default: {_show(value)}]")
    return lines[1:]


def reference() -> str:
    """docs/config.md: every option in a table a section. `python -m pctrain.config.help > docs/config.md` writes it anew."""
    parts = [
        "# Options",
        "Every key of the config tree: in a YAML file (`--config`), and as `--section.key=value` over it. `base: FILE` in a file "
        "names one, or several, that it goes over. Made from `pctrain/config/tree.py` by `python -m pctrain.config.help > docs/config.md`.",
    ]
    for name in Config.model_fields:
        section = getattr(Config(), name)
        rows = ["| key | type | default | |", "|---|---|---|---|"]
        for key, field, value in _options(section, name):
            limits = _limits(field)
            cells = (
                key,
                describe_type(field.annotation),
                _show(value),
                f"{field.description}{f' ({limits})' if limits else ''}",
            )
            rows.append("| " + " | ".join(cell.replace("|", "\\|") for cell in (f"`{cells[0]}`", *cells[1:])) + " |")
        parts += [f"## {name}", *filter(None, [_summary(type(section))]), "\n".join(rows)]
    return "\n\n".join(parts) + "\n"


def own_option_lines(kind: type[Section]) -> list[str]:
    """The options that one command has beside the config tree: the fields of `kind`."""
    lines = []
    for name, field in kind.model_fields.items():
        value = field.get_default(call_default_factory=True)
        lines += _lines(name, field, "[required]" if field.is_required() else f"[default: {_show(value)}]")
    return lines


def help_width() -> int:
    """Return the columns that help texts are wrapped to: those of the terminal, within bounds."""
    return max(72, min(shutil.get_terminal_size((120, 24)).columns, 140))


def _lines(key: str, field: FieldInfo, ending: str) -> list[str]:
    limits = _limits(field)
    text = f"{field.description}{f' ({limits})' if limits else ''}  {ending}"
    return [
        f"  --{key} {describe_type(field.annotation)}",
        *textwrap.wrap(text, help_width(), initial_indent=" " * 8, subsequent_indent=" " * 8),
    ]


def describe_type(annotation: Any) -> str:
    """INT, FLOAT, PATH, TEXT, true|false, the words of a choice, or a list of one of these."""
    if annotation is Sources:
        return "PATH or [{path, weight, name}, ...]"
    if annotation is Benchmark:
        return "PATH or {path, samples, verifier, instruction, fields}"
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return "{key: value, ...}"
    if get_origin(annotation) is Annotated:
        return describe_type(get_args(annotation)[0])
    if get_origin(annotation) is dict:
        return f"{{NAME: {describe_type(get_args(annotation)[1])}, ...}}"
    if get_origin(annotation) is Literal:
        return "|".join(str(word) for word in get_args(annotation))
    if get_origin(annotation) is tuple:
        return f"[{', '.join(describe_type(part) for part in get_args(annotation))}]"
    if get_origin(annotation) is list:
        return f"[{describe_type(get_args(annotation)[0])}, ...]"
    if get_origin(annotation) in (Union, types.UnionType):
        return " or ".join(describe_type(a) for a in get_args(annotation) if a is not type(None))
    return {int: "INT", float: "FLOAT", bool: "true|false", str: "TEXT", Path: "PATH"}[annotation]


def iter_keys() -> Iterator[tuple[str, FieldInfo]]:
    """Yield every key that the command line takes, with its field: each section below the top ones, and each option."""
    for name, field in Config.model_fields.items():
        yield name, field
        yield from _iter_keys(field.annotation, name)


def _iter_keys(section: Any, prefix: str) -> Iterator[tuple[str, FieldInfo]]:
    if isinstance(section, type) and issubclass(section, Section):
        for name, field in section.model_fields.items():
            yield f"{prefix}.{name}", field
            yield from _iter_keys(field.annotation, f"{prefix}.{name}")


def _options(section: Section, prefix: str) -> Iterator[tuple[str, FieldInfo, Any]]:
    for name, field in type(section).model_fields.items():
        value = getattr(section, name)
        if isinstance(value, Section):
            yield from _options(value, f"{prefix}.{name}")
        else:
            yield f"{prefix}.{name}", field, value


def _summary(section: type[Section]) -> str:
    doc = section.__doc__ or ""
    return " ".join(doc.split()) if doc != Section.__doc__ else ""


def _limits(field: FieldInfo) -> str:
    signs = {annotated_types.Ge: ">=", annotated_types.Gt: ">", annotated_types.Le: "<=", annotated_types.Lt: "<"}
    # The bound is the attribute of the rule's own name: Ge.ge, Lt.lt.
    found = [
        (signs[type(rule)], getattr(rule, type(rule).__name__.lower()))
        for rule in field.metadata
        if type(rule) in signs
    ]
    return ", ".join(f"{sign} {value:g}" for sign, value in found)


def _show(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list):
        return f"[{', '.join(str(v) for v in value)}]"
    return str(value)


if __name__ == "__main__":
    print(reference(), end="")
