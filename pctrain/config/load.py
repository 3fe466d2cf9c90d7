"""Load a config: from a YAML file and `--section.key=value` to a checked `Config`.

    defaults of the tree  <-  YAML files that `base` names  <-  YAML file  <-  command line

Every value keeps its origin (file and line, or the command line), so that each error says where the value came from.
All mistakes of one kind are reported at once. Nothing heavy is imported.
"""

from __future__ import annotations

import difflib
import json
import os
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, get_origin

import yaml
from pydantic import ValidationError
from pydantic_core import ErrorDetails

from pctrain.common import plugins
from pctrain.common.errors import UserError
from pctrain.config.algorithm import DEFAULT, AlgorithmOptions, built_in, check_own, expected_names, options_class
from pctrain.config.check import check_combinations
from pctrain.config.keys import ALGORITHM, SECTIONS, Key, algorithms_with, exists, field_at, section_at, unknown_key
from pctrain.config.settings import Setting, command_line_settings, cut, file_settings, refuse_unfit, shown
from pctrain.config.tree import BenchmarkConfig, Config, SourceConfig

MOST_LINES = 30  # of a message


def load(path: Path | None, overrides: Sequence[str], *, sections: Collection[str] = SECTIONS) -> Config:
    """Return the checked config of a run.

    Args:
        path: YAML file, or None for the defaults alone.
        overrides: settings that override the file, `--section.key=value`; values are YAML.
        sections: the sections that the command uses. Impossible combinations are only looked for in these; keys
            and types are checked everywhere.

    Raises:
        UserError: a missing or malformed file, an unknown key, a wrong type, or a combination that is impossible at
            this world size (`WORLD_SIZE` of the environment, which torchrun sets; 1 without it).
    """
    config = read(path, overrides)
    check_combinations(config, world_size_from_environment(), sections)
    return config


def read(path: Path | None, overrides: Sequence[str]) -> Config:
    """Return the config with keys and types checked, but not their combinations."""
    settings = list(file_settings(path)) if path is not None else []
    settings += command_line_settings(overrides)
    refuse_unfit(settings)
    unknown = [unknown_key(s.dotted, s.origin) for s in settings if not exists(s.key)]
    if unknown:
        raise UserError("\n".join(unknown))
    algorithm, algorithm_problems = _read_algorithm([s for s in settings if s.key[:2] == ALGORITHM])
    # The defaults as plain data. Settings are laid over them one by one, so that a section that is given in part keeps
    # the other defaults.
    data = Config().model_dump(mode="json")
    for setting in settings:
        if setting.key[:2] != ALGORITHM:
            _put(data, setting)
    try:
        # JSON with strict types: a path may be a string and 1 may be a float, but true is no number and "3" no integer.
        config = Config.model_validate_json(json.dumps(data, default=str), strict=True)
    except ValidationError as error:
        problems = _type_errors(error, {s.key: s.origin for s in settings})
        raise UserError(_joined([*problems, *algorithm_problems])) from None
    if algorithm_problems:
        raise UserError(_joined(algorithm_problems))
    config.rl.algorithm = algorithm
    config.study.algorithms = [check_own(options) for options in config.study.algorithms]
    return config


def dump(config: Config) -> str:
    """Return the whole config as YAML; `read` of that text gives an equal config."""
    # ASCII with escapes: PyYAML reads an unescaped U+0085 in a name as a line break.
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)


def world_size_from_environment() -> int:
    """Return the number of ranks that torchrun started, 1 without torchrun."""
    text = os.environ.get("WORLD_SIZE", "1")
    if not text.isdecimal() or int(text) < 1:
        raise UserError(f"environment variable WORLD_SIZE: expected a number of ranks, 1 or more, got {text!r}")
    return int(text)


def _put(data: dict[str, Any], setting: Setting) -> None:
    if section_at(setting.key) is not None:
        name = f"{setting.dotted} ({setting.origin})" if setting.key else setting.origin
        expected = "a section" if setting.key else "sections"
        raise UserError(f"{name}: expected {expected} (key: value pairs), got {shown(setting.value)}")
    for name in setting.key[:-1]:
        data = data[name]
    data[setting.key[-1]] = setting.value


# ---- rl.algorithm ----------------------------------------------------------------------------------------------------


def _read_algorithm(settings: Sequence[Setting]) -> tuple[AlgorithmOptions, list[str]]:
    """Return the options of the algorithm that is named last, and what is wrong with them."""
    name = DEFAULT
    values: dict[str, Setting] = {}
    for setting in settings:
        if setting.key == ALGORITHM or setting.key[2:] == ("name",):
            name = _algorithm_name(setting)
        else:
            values[setting.key[2]] = setting
    options = options_class(name)
    problems = [
        _foreign_option(setting, name, options) for key, setting in values.items() if key not in options.option_fields()
    ]
    given = {"name": name} | {key: s.value for key, s in values.items() if key in options.option_fields()}
    try:
        return options.model_validate_json(json.dumps(given, default=str), strict=True), problems
    except ValidationError as error:
        origins = {setting.key: setting.origin for setting in values.values()}
        return options.model_construct(name=name), [*problems, *_type_errors(error, origins, ALGORITHM)]


def _algorithm_name(setting: Setting) -> str:
    name = setting.value
    if isinstance(name, str) and (name in built_in() or plugins.NAME.fullmatch(name)):
        return name
    near = difflib.get_close_matches(str(name), built_in(), n=1, cutoff=0.6)
    hint = f"; did you mean {near[0]}?" if near else ""
    raise UserError(f"rl.algorithm ({setting.origin}): expected {expected_names()}, got {_as_json(name)}{hint}")


def _foreign_option(setting: Setting, name: str, options: type[AlgorithmOptions]) -> str:
    """Return the message for an option that this algorithm does not have, with the algorithms that do."""
    key = setting.key[2]
    has = list(options.option_fields())
    others = algorithms_with(key)
    near = difflib.get_close_matches(key, has, n=1, cutoff=0.6)
    if near and not others:
        hint = f"did you mean rl.algorithm.{near[0]}?"
    else:
        owners = f"it belongs to {', '.join(others)}; " if others else ""
        hint = f"{owners}{name} has: {', '.join(has)}"
    return f"rl.algorithm.{key} ({setting.origin}) is not an option of {name}; {hint}"


# ---- type errors -----------------------------------------------------------------------------------------------------

_EXPECTED = {
    "int_type": "an integer",
    "int_from_float": "an integer",
    "float_type": "a number",
    "bool_type": "true or false",
    "string_type": "a string",
    "path_type": "a path",
    "list_type": "a list, such as [a, b]",
}


def _type_errors(error: ValidationError, origins: Mapping[Key, str], prefix: Key = ()) -> list[str]:
    """Return one line for each value of a wrong type. `prefix` is the key of the section that was validated."""
    lines = [_type_error(item, origins, prefix) for item in error.errors(include_url=False)]
    return list(dict.fromkeys(lines))


def _type_error(item: ErrorDetails, origins: Mapping[Key, str], prefix: Key) -> str:
    location = (*prefix, *item["loc"])
    key = _option_in(location)
    below = _below_option(key, location)
    name = ".".join([*key, *below])
    origin = origins.get(key, "default")
    if item["type"] in ("extra_forbidden", "missing"):
        problem = "unknown key" if item["type"] == "extra_forbidden" else "missing"
        item_class = BenchmarkConfig if key == ("eval", "benchmarks") else SourceConfig
        return f"{name} ({origin}): {problem}; an item takes {', '.join(item_class.model_fields)}"
    if item["type"] == "algorithm_options":
        return f"{name} ({origin}): {item['msg']}"
    expected = _EXPECTED.get(item["type"]) or _expected_text(item["msg"])
    return f"{name} ({origin}): expected {expected}, got {cut(_as_json(item['input']))}"


def _expected_text(message: str) -> str:
    """Return what pydantic expects as a noun: `a value greater than or equal to 1`, or a list of choices."""
    text = message.removeprefix("Input should be ")
    return f"a value {text}" if text.startswith(("greater", "less")) else text


def _option_in(location: Sequence[int | str]) -> Key:
    """Return the longest beginning of an error's location that is a key of the tree."""
    names: list[str] = []
    for part in location:
        if not isinstance(part, str) or not exists((*names, part)):
            break
        names.append(part)
    return tuple(names)


def _below_option(key: Key, location: Sequence[int | str]) -> list[str]:
    """Return what of a location is an item of a list or a mapping. pydantic also appends the member of a union."""
    below = location[len(key) :]
    field = field_at(key)
    is_mapping = field is not None and get_origin(field.annotation) is dict
    has_item = is_mapping or any(isinstance(part, int) for part in below)
    return [str(part) for part in below] if has_item else []


def _joined(lines: Iterable[str]) -> str:
    lines = list(lines)
    more = [f"and {len(lines) - MOST_LINES} more of this kind"] if len(lines) > MOST_LINES else []
    return "\n".join([*lines[:MOST_LINES], *more])


def _as_json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, default=str)
