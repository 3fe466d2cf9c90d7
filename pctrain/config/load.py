"""From a YAML file and `--section.key=value` to a checked `Config`.

    defaults of config.py  <-  YAML files that `base` names  <-  YAML file  <-  command line

Every value keeps its origin (file and line, or the command-line argument), so that each error says where the value came from.
All mistakes of one kind are told at once. Nothing heavy is imported here.
"""

from __future__ import annotations

import difflib
import json
import math
import os
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args, get_origin

import yaml
from pydantic import ValidationError

from pctrain.common.errors import UserError
from pctrain.config.check import check_combinations
from pctrain.config.tree import BenchmarkConfig, Config, Section, SourceConfig, Sources
from pctrain.files.yaml_text import Loader, composed, construct, parse

SECTIONS = tuple(Config.model_fields)
# What a run folder's config.yaml holds beside the config; such a file may be given as --config to start the next run.
RUN_FOLDER_KEYS = {"kind", "fingerprints"}
BASE = "base"  # a file's key for the files that it goes over
MOST_FILES = 100  # of one config: a few that name files twice would stand for millions
SHOWN, MOST_LINES = 200, 30  # characters of a value in a message, and lines of it


def load(path: Path | None, overrides: Sequence[str], *, sections: Collection[str] = SECTIONS) -> Config:
    """The resolved config of a run.

    Args:
        path: YAML file, or None for the defaults alone.
        overrides: command-line tokens, `--section.key=value` or `--section.key value`; values are YAML.
        sections: the sections that the command uses; impossible combinations in the others are not looked for.
            Keys and types are always checked everywhere.
    Raises:
        UserError: missing or malformed file, unknown key, wrong type, impossible combination at this world size
            (`WORLD_SIZE` of the environment, as torchrun sets it; 1 without).
    """
    config = read(path, overrides)
    check_combinations(config, world_size_from_environment(), sections)
    return config


def read(path: Path | None, overrides: Sequence[str]) -> Config:
    """As `load`, without looking for impossible combinations."""
    settings = list(_file_settings(path)) if path is not None else []
    settings += _command_line_settings(overrides)
    _refuse_unfit(settings)
    _refuse_unknown(settings)
    data = _defaults()
    for setting in settings:
        _put(data, setting)
    try:
        # JSON mode with strict types: a path may be a string and 1 may be a float, but true is no number and "3" no integer.
        return Config.model_validate_json(json.dumps(data, default=str), strict=True)
    except ValidationError as error:
        raise UserError(_type_errors(error, {s.key: s.origin for s in settings})) from None


def dump(config: Config) -> str:
    """The whole resolved config as YAML; `load` of that text gives an equal config."""
    # ASCII with escapes: PyYAML reads an unescaped U+0085 of a name as a line break.
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)


def world_size_from_environment() -> int:
    text = os.environ.get("WORLD_SIZE", "1")
    if not text.isdecimal() or int(text) < 1:
        raise UserError(f"environment variable WORLD_SIZE: expected a number of ranks, 1 or more, got {text!r}")
    return int(text)


# ---------------------------------------------------------------- settings: one value with its key and its origin


@dataclass(frozen=True)
class _Setting:
    key: tuple[str, ...]
    value: Any
    origin: str  # "<file>:<line>" or "command line"

    @property
    def dotted(self) -> str:
        return ".".join(self.key)


def _file_settings(path: Path, above: tuple[Path, ...] = (), opened: list[Path] | None = None) -> Iterator[_Setting]:
    """Those of the files that its `base` names come first, so that its own go over them.

    `above`: the files that led here; `opened`: all that were read so far.
    """
    if path.resolve() in above:
        raise UserError(f"config file {path}: `base` comes back to it by {' -> '.join(str(file) for file in above)}")
    opened = [] if opened is None else opened
    opened.append(path)
    if len(opened) > MOST_FILES:
        raise UserError(
            f"config file {path}: more than {MOST_FILES} files are read for one config; name fewer under `base`"
        )
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(f"config file {path} does not exist") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"config file {path} cannot be read: {error}") from None
    try:
        with composed(text) as (loader, root):
            if root is not None:
                for base in _bases(loader, root, path):
                    yield from _file_settings(base, (*above, path.resolve()), opened)
                yield from _node_settings(loader, root, (), path)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        raise UserError(f"{path}:{mark.line + 1 if mark else '?'}: not valid YAML: {error.problem}") from None
    except yaml.YAMLError as error:
        raise UserError(f"{path}: not valid YAML: {error}") from None


def _bases(loader: Loader, root: yaml.Node, path: Path) -> list[Path]:
    """The files that `base: FILE` or `base: [FILE, ...]` names, from the folder of this one; the key is taken out of the tree."""
    pairs = [pair for pair in (root.value if isinstance(root, yaml.MappingNode) else []) if pair[0].value == BASE]
    if len(pairs) > 1:
        first, second = (name.start_mark.line + 1 for name, _ in pairs[:2])
        raise UserError(f"{path}:{second}: {BASE} is given twice (first on line {first})")
    if not pairs:
        return []
    root.value.remove(pairs[0])
    named = construct(loader, pairs[0][1])
    names = named if isinstance(named, list) else [named]
    if not names or not all(isinstance(name, str) and name and _is_text(name) for name in names):
        line = pairs[0][0].start_mark.line + 1
        raise UserError(
            f"{path}:{line}: {BASE}: expected a config file, or a list of them, from the folder of this one; "
            f"got {_shown(named)}"
        )
    return [path.parent / name for name in names]


def _node_settings(loader: Loader, node: yaml.Node, key: tuple[str, ...], path: Path) -> Iterator[_Setting]:
    """One setting for each leaf; a mapping is walked as long as the key names a section."""
    origin = f"{path}:{node.start_mark.line + 1}"
    if _section(key) is None or not isinstance(node, yaml.MappingNode):
        empty = isinstance(node, yaml.ScalarNode) and node.value == ""  # `sft:` with all its keys commented out
        if _section(key) is None or not empty:
            yield _Setting(key, construct(loader, node), origin)
        return
    for name_node, _ in node.value:
        if not isinstance(name_node, yaml.ScalarNode):
            raise UserError(
                f"{path}:{name_node.start_mark.line + 1}: expected the name of a key, found a list or a mapping in its place"
            )
    names = {str(name_node.value) for name_node, _ in node.value}
    passed_over = RUN_FOLDER_KEYS if not key and RUN_FOLDER_KEYS <= names else set()
    seen: dict[str, int] = {}
    for name_node, value_node in node.value:
        name, line = str(name_node.value), name_node.start_mark.line + 1
        if name in seen:
            raise UserError(f"{path}:{line}: {'.'.join((*key, name))} is given twice (first on line {seen[name]})")
        seen[name] = line
        if name in passed_over:
            continue
        for setting in _node_settings(loader, value_node, (*key, name), path):
            # The key's line, not the value's: a block list begins a line later.
            yield _Setting(setting.key, setting.value, f"{path}:{line}") if setting.key == (*key, name) else setting


def _command_line_settings(overrides: Sequence[str]) -> list[_Setting]:
    settings: list[_Setting] = []
    for token in overrides:
        name, equals, text = token.removeprefix("--").partition("=")
        if not token.startswith("--") or not equals:
            raise UserError(f"unexpected argument {token!r}: options have the form --section.key=value")
        key = tuple(name.split("."))
        if _section(key) is None and _field(key) is None:
            raise UserError(unknown_key(name, "command line"))
        settings += _text_settings(key, text)
    return settings


def _text_settings(key: tuple[str, ...], text: str) -> Iterator[_Setting]:
    try:
        value = parse(text)
    except yaml.YAMLError as error:
        problem = getattr(error, "problem", None) or error
        raise UserError(f"--{'.'.join(key)}: {_shown(text)} is not valid YAML: {problem}") from None
    field = _field(key)
    if (
        field is not None
        and value is not None
        and _takes_text(field.annotation, several=isinstance(value, (list, dict)))
    ):
        value = text  # --run.dir=2024 is a path: a shell has no quotes left to say so
    yield from _flatten(key, value)


def _flatten(key: tuple[str, ...], value: Any) -> Iterator[_Setting]:
    if _section(key) is not None and isinstance(value, dict):
        for name, inner in value.items():
            yield from _flatten((*key, str(name)), inner)
    else:
        yield _Setting(key, value, "command line")


# ---------------------------------------------------------------- the config tree


def _section(key: tuple[str, ...]) -> type[Section] | None:
    """The section class at this key; None if the key is an option, or unknown. () is the whole tree."""
    section: Any = Config
    for name in key:
        field = section.model_fields.get(name)
        section = field.annotation if field is not None else None
        if not (isinstance(section, type) and issubclass(section, Section)):
            return None
    return section


def _field(key: tuple[str, ...]):
    section = _section(key[:-1])
    return section.model_fields.get(key[-1]) if section is not None else None


def _takes_text(annotation: Any, several: bool) -> bool:
    """A path or a string; or sources, of which a path alone stands for one."""
    kinds = (annotation, *get_args(annotation)) if get_origin(annotation) is not dict else ()
    return str in kinds or Path in kinds or (Sources in kinds and not several)


def _leaves(section: type[Section] = Config, prefix: str = "") -> Iterator[str]:
    for name, field in section.model_fields.items():
        inner = field.annotation
        if isinstance(inner, type) and issubclass(inner, Section):
            yield from _leaves(inner, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}"


def _defaults() -> dict[str, Any]:
    """The default tree as plain data. Values are laid over it one by one, so a section that is given in part keeps the defaults of
    its place: `rl.optimizer: {warmup: 5}` keeps rl's learning rate, where building OptimizerConfig(warmup=5) would take sft's."""
    return Config().model_dump(mode="json")


def _put(data: dict[str, Any], setting: _Setting) -> None:
    if _section(setting.key) is not None:
        name = f"{setting.dotted} ({setting.origin})" if setting.key else setting.origin
        raise UserError(
            f"{name}: expected {'a section' if setting.key else 'sections'} (key: value pairs), got {_shown(setting.value)}"
        )
    for name in setting.key[:-1]:
        data = data[name]
    data[setting.key[-1]] = setting.value


# ---------------------------------------------------------------- errors


def _refuse_unknown(settings: list[_Setting]) -> None:
    messages = [
        unknown_key(s.dotted, s.origin) for s in settings if s.key and _section(s.key) is None and _field(s.key) is None
    ]
    if messages:
        raise UserError("\n".join(messages))


def unknown_key(dotted: str, origin: str) -> str:
    """Return the message for a key that does not exist, with the nearest ones that do."""
    near = nearest_keys(dotted)
    hint = f"did you mean {' or '.join(near)}?" if near else f"sections are: {', '.join(SECTIONS)}"
    return f"unknown key {dotted} ({origin}); {hint}"


def nearest_keys(dotted: str) -> list[str]:
    """Known names near an unknown one, best first: in the same section, then the same name elsewhere, then anywhere."""
    key = tuple(dotted.split("."))
    depth = next(n for n in range(len(key) - 1, -1, -1) if _section(key[:n]) is not None)
    siblings = difflib.get_close_matches(key[depth], list(_section(key[:depth]).model_fields), n=1, cutoff=0.6)
    if siblings:
        fixed = (*key[:depth], siblings[0], *key[depth + 1 :])
        if _section(fixed) is not None or _field(fixed) is not None:
            return [".".join(fixed)]
        deeper = (
            nearest_keys(".".join(fixed)) if _section(fixed[: depth + 1]) is not None and len(fixed) > depth + 1 else []
        )
        return deeper or [".".join((*key[:depth], siblings[0]))]
    leaves = list(_leaves())
    same_name = [leaf for leaf in leaves if leaf.split(".")[-1] == key[-1]]
    here = [leaf for leaf in same_name if depth and leaf.startswith(".".join(key[:depth]) + ".")]
    return here or same_name or difflib.get_close_matches(dotted, leaves, n=1, cutoff=0.6)


def _refuse_unfit(settings: list[_Setting]) -> None:
    """Values that YAML can say and no option takes; what comes after may write all others down, as JSON and as names of files."""
    for s in settings:
        if expected := _what_fits(s.value):
            raise UserError(f"{s.dotted or 'the file'} ({s.origin}): expected {expected}")


def _what_fits(value: Any) -> str | None:
    """What was expected in place of a value, or of one inside of it; None: it fits."""
    if isinstance(value, dict):
        inside = [*value, *value.values()]
        if any(isinstance(name, (list, dict, tuple)) for name in value):
            return "names as keys, got a list in the place of one"
        return next(filter(None, map(_what_fits, inside)), None)
    if isinstance(value, list):
        return next(filter(None, map(_what_fits, value)), None)
    if isinstance(value, float) and not math.isfinite(value):
        return f"a finite number, got {value}"
    if isinstance(value, int) and not -(2**63) <= value < 2**63:
        return "a number of at most 64 bits, got a larger one"
    if isinstance(value, str) and not _is_text(value):
        return f"text, got {_shown(value)}: a zero byte, or bytes that are no UTF-8"
    if value is not None and not isinstance(value, (bool, int, float, str)):
        return f"a number, text, a list or key: value pairs, got a value of the kind {type(value).__name__}; leave out its tag"
    return None


def _is_text(value: str) -> bool:
    """No NUL, which no path may hold, and no half of a surrogate pair, which no file in UTF-8 may."""
    return "\0" not in value and not any("\ud800" <= character <= "\udfff" for character in value)


def _shown(value: Any) -> str:
    return _cut(repr(value))


def _cut(text: str) -> str:
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}…"


def _type_errors(error: ValidationError, origins: dict[tuple[str, ...], str]) -> str:
    lines = []
    for item in error.errors(include_url=False):
        loc = item["loc"]
        depth = next(
            n
            for n in range(len(loc), 0, -1)
            if all(isinstance(part, str) for part in loc[:n]) and _field(loc[:n]) is not None
        )
        # Below the option: an item of a list or a mapping, and its key. (pydantic also appends the member of a union that failed.)
        mapping = get_origin(_field(loc[:depth]).annotation) is dict
        inner = (
            [str(part) for part in loc[depth:]] if mapping or any(isinstance(part, int) for part in loc[depth:]) else []
        )
        name, origin = ".".join([*loc[:depth], *inner]), origins.get(loc[:depth], "default")
        if item["type"] in ("extra_forbidden", "missing"):
            what = "unknown key" if item["type"] == "extra_forbidden" else "missing"
            item_fields = (
                BenchmarkConfig.model_fields if loc[:depth] == ("eval", "benchmarks") else SourceConfig.model_fields
            )
            line = f"{name} ({origin}): {what}; an item takes {', '.join(item_fields)}"
        else:
            expected = _EXPECTED.get(item["type"]) or item["msg"].removeprefix("Input should be ")
            line = f"{name} ({origin}): expected {expected}, got {_cut(json.dumps(item['input'], ensure_ascii=False))}"
        if line not in lines:
            lines.append(line)
    more = [f"and {len(lines) - MOST_LINES} more of this kind"] if len(lines) > MOST_LINES else []
    return "\n".join([*lines[:MOST_LINES], *more])


_EXPECTED = {
    "int_type": "an integer",
    "int_from_float": "an integer",
    "float_type": "a number",
    "bool_type": "true or false",
    "string_type": "a string",
    "path_type": "a path",
    "list_type": "a list, such as [a, b]",
}
