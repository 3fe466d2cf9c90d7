"""Settings: single values with their key and their origin, read from YAML files and from the command line."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args, get_origin

import yaml

from pctrain.common.errors import UserError
from pctrain.config.data import Sources
from pctrain.config.keys import ALGORITHM, Key, exists, field_at, section_at, unknown_key
from pctrain.files.yaml_text import Loader, composed, construct, parse

BASE = "base"  # the key of a file that names the files it overrides
COMMAND_LINE = "command line"
# What config.yaml of a run folder has besides the config. Such a file may be given as --config to start the next run.
RUN_FOLDER_KEYS = {"kind", "fingerprints"}
MOST_FILES = 100  # for one config: a few files that name each other twice would mean millions
MOST_CHARACTERS = 200  # of a value in a message


@dataclass(frozen=True)
class Setting:
    """One value. Its origin is "FILE:LINE" or "command line"."""

    key: Key
    value: Any
    origin: str

    @property
    def dotted(self) -> str:
        """Return the key as it is typed."""
        return ".".join(self.key)


def shown(value: Any) -> str:
    """Return a value for a message."""
    return cut(repr(value))


def cut(text: str) -> str:
    """Return a text for a message, shortened if it is long."""
    return text if len(text) <= MOST_CHARACTERS else f"{text[:MOST_CHARACTERS]}…"


# ---- YAML files ------------------------------------------------------------------------------------------------------


def file_settings(path: Path, above: tuple[Path, ...] = (), opened: list[Path] | None = None) -> Iterator[Setting]:
    """Yield the settings of a file. Those of the files under its key `base` come first, so that it overrides them.

    Args:
        path: the YAML file.
        above: the files that led to this one.
        opened: all files read so far.
    """
    if path.resolve() in above:
        chain = " -> ".join(str(file) for file in above)
        raise UserError(f"config file {path}: `base` comes back to it by {chain}")
    opened = [] if opened is None else opened
    opened.append(path)
    if len(opened) > MOST_FILES:
        raise UserError(
            f"config file {path}: more than {MOST_FILES} files are read for one config; name fewer under `base`"
        )
    text = _read_text(path)
    try:
        with composed(text) as (loader, root):
            if root is not None:
                for base in _take_bases(loader, root, path):
                    yield from file_settings(base, (*above, path.resolve()), opened)
                yield from _node_settings(loader, root, (), path)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        raise UserError(f"{path}:{mark.line + 1 if mark else '?'}: not valid YAML: {error.problem}") from None
    except yaml.YAMLError as error:
        raise UserError(f"{path}: not valid YAML: {error}") from None


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(f"config file {path} does not exist") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"config file {path} cannot be read: {error}") from None


def _take_bases(loader: Loader, root: yaml.Node, path: Path) -> list[Path]:
    """Return the files that `base: FILE` or `base: [FILE, ...]` names, relative to this file; remove the key."""
    pairs = [pair for pair in (root.value if isinstance(root, yaml.MappingNode) else []) if pair[0].value == BASE]
    if len(pairs) > 1:
        first, second = (name.start_mark.line + 1 for name, _ in pairs[:2])
        raise UserError(f"{path}:{second}: {BASE} is given twice (first on line {first})")
    if not pairs:
        return []
    root.value.remove(pairs[0])
    value = construct(loader, pairs[0][1])
    names = value if isinstance(value, list) else [value]
    if not names or not all(isinstance(name, str) and name and _is_text(name) for name in names):
        line = pairs[0][0].start_mark.line + 1
        raise UserError(
            f"{path}:{line}: {BASE}: expected a config file or a list of them, relative to the folder of this one; got "
            f"{shown(value)}"
        )
    return [path.parent / name for name in names]


def _node_settings(loader: Loader, node: yaml.Node, key: Key, path: Path) -> Iterator[Setting]:
    """Yield one setting for each leaf. A mapping is entered as long as its key names a section."""
    if section_at(key) is None:
        yield Setting(key, construct(loader, node), f"{path}:{node.start_mark.line + 1}")
    elif isinstance(node, yaml.MappingNode):
        yield from _mapping_settings(loader, node, key, path)
    elif not (isinstance(node, yaml.ScalarNode) and node.value == ""):  # `sft:` with all of its keys commented out
        yield Setting(key, construct(loader, node), f"{path}:{node.start_mark.line + 1}")


def _mapping_settings(loader: Loader, node: yaml.MappingNode, key: Key, path: Path) -> Iterator[Setting]:
    lines = _lines_of_names(node, key, path)
    skipped = RUN_FOLDER_KEYS if not key and lines.keys() >= RUN_FOLDER_KEYS else set()
    for name_node, value_node in node.value:
        name = str(name_node.value)
        if name in skipped:
            continue
        inner = (*key, name)
        for setting in _node_settings(loader, value_node, inner, path):
            # The line of the key, not of the value: a block list begins a line later.
            origin = f"{path}:{lines[name]}" if setting.key == inner else setting.origin
            yield Setting(setting.key, setting.value, origin)


def _lines_of_names(node: yaml.MappingNode, key: Key, path: Path) -> dict[str, int]:
    """Return the line of each name of a mapping. UserError if one is given twice or is no name."""
    lines: dict[str, int] = {}
    for name_node, _ in node.value:
        line = name_node.start_mark.line + 1
        if not isinstance(name_node, yaml.ScalarNode):
            raise UserError(f"{path}:{line}: expected the name of a key, found a list or a mapping in its place")
        name = str(name_node.value)
        if name in lines:
            dotted = ".".join((*key, name))
            raise UserError(f"{path}:{line}: {dotted} is given twice (first on line {lines[name]})")
        lines[name] = line
    return lines


# ---- command line ----------------------------------------------------------------------------------------------------


def command_line_settings(overrides: Sequence[str]) -> list[Setting]:
    """Return the settings of `--section.key=value` arguments, whose values are YAML."""
    settings: list[Setting] = []
    for token in overrides:
        name, equals, text = token.removeprefix("--").partition("=")
        if not token.startswith("--") or not equals:
            raise UserError(f"unexpected argument {token!r}: options have the form --section.key=value")
        key = tuple(name.split("."))
        if not exists(key):
            raise UserError(unknown_key(name, COMMAND_LINE))
        settings += _flatten(key, _parse(key, text))
    return settings


def _parse(key: Key, text: str) -> Any:
    """Return the value of a text. A text for an option that takes text stays as it is: a shell leaves no quotes."""
    if key == ALGORITHM and not text.lstrip().startswith("{"):
        return text
    try:
        value = parse(text)
    except yaml.YAMLError as error:
        problem = getattr(error, "problem", None) or error
        raise UserError(f"--{'.'.join(key)}: {shown(text)} is not valid YAML: {problem}") from None
    field = field_at(key)
    if field is None or value is None:
        return value
    return text if _takes_text(field.annotation, is_list=isinstance(value, (list, dict))) else value


def _takes_text(annotation: Any, is_list: bool) -> bool:
    """Return whether an option is a path or a string, or sources given by one path."""
    kinds = (annotation, *get_args(annotation)) if get_origin(annotation) is not dict else ()
    return str in kinds or Path in kinds or (Sources in kinds and not is_list)


def _flatten(key: Key, value: Any) -> Iterator[Setting]:
    if section_at(key) is not None and isinstance(value, dict):
        for name, inner in value.items():
            yield from _flatten((*key, str(name)), inner)
    else:
        yield Setting(key, value, COMMAND_LINE)


# ---- values that no option takes -------------------------------------------------------------------------------------


def refuse_unfit(settings: Sequence[Setting]) -> None:
    """Raise UserError for a value that YAML can express but that cannot be JSON or the name of a file."""
    for setting in settings:
        if expected := _expected_instead(setting.value):
            raise UserError(f"{setting.dotted or 'the file'} ({setting.origin}): expected {expected}")


def _expected_instead(value: Any) -> str | None:
    """Return what was expected instead of a value or of one inside it, or None if it fits."""
    if isinstance(value, dict):
        if any(isinstance(name, (list, dict, tuple)) for name in value):
            return "names as keys, got a list in the place of one"
        return next(filter(None, map(_expected_instead, [*value, *value.values()])), None)
    if isinstance(value, list):
        return next(filter(None, map(_expected_instead, value)), None)
    if isinstance(value, float) and not math.isfinite(value):
        return f"a finite number, got {value}"
    if isinstance(value, int) and not -(2**63) <= value < 2**63:
        return "a number of at most 64 bits, got a larger one"
    if isinstance(value, str) and not _is_text(value):
        return f"text, got {shown(value)}: a zero byte, or bytes that are not UTF-8"
    if value is not None and not isinstance(value, (bool, int, float, str)):
        kind = type(value).__name__
        return f"a number, text, a list or key: value pairs, got a value of the kind {kind}; leave out its tag"
    return None


def _is_text(value: str) -> bool:
    """Return whether a text has no NUL, which no path can hold, and no half surrogate pair, which UTF-8 cannot hold."""
    return "\0" not in value and not any("\ud800" <= character <= "\udfff" for character in value)
