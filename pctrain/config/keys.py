"""Keys of the config tree: which exist, and which are near one that does not."""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from typing import Any

from pydantic.fields import FieldInfo

from pctrain.config.algorithm import built_in
from pctrain.config.section import Section
from pctrain.config.tree import Config

Key = tuple[str, ...]

SECTIONS = tuple(Config.model_fields)
ALGORITHM = ("rl", "algorithm")
# Options that were keys of `rl` and have another name now; all others kept theirs.
_RENAMED = {
    "upt_gamma": "gamma",
    "upt_sft_coef": "sft_coef",
    "prefix_low_start": "low_start",
    "prefix_low_end": "low_end",
    "prefix_high": "high",
    "prefix_beta_a": "beta_a",
    "prefix_beta_b": "beta_b",
    "prefix_entropy_share": "entropy_share",
}


def section_at(key: Key) -> type[Section] | None:
    """Return the section class at a key, or None if it is an option or does not exist. () is the whole tree."""
    section: type[Section] = Config
    for name in key:
        field = section.model_fields.get(name)
        inner = field.annotation if field is not None else None
        if not (isinstance(inner, type) and issubclass(inner, Section)):
            return None
        section = inner
    return section


def field_at(key: Key) -> FieldInfo | None:
    """Return the field of an option or a section, or None if there is no such key."""
    if not key:
        return None
    if key[:-1] == ALGORITHM:
        return algorithm_options().get(key[-1])
    section = section_at(key[:-1])
    return section.model_fields.get(key[-1]) if section is not None else None


def exists(key: Key) -> bool:
    """Return whether a key names the tree, a section or an option. Any option of an algorithm may exist."""
    return section_at(key) is not None or field_at(key) is not None or key[:-1] == ALGORITHM


def algorithm_options() -> dict[str, FieldInfo]:
    """Return the options of all built-in algorithms, by name, with the field of the first that has it."""
    options: dict[str, FieldInfo] = {}
    for algorithm in built_in().values():
        options = algorithm.option_fields() | options
    return options


def algorithms_with(option: str) -> list[str]:
    """Return the names of the built-in algorithms that have an option."""
    return [name for name, algorithm in built_in().items() if option in algorithm.option_fields()]


def iter_keys() -> Iterator[tuple[str, FieldInfo]]:
    """Yield every key that the command line takes, with its field: sections, options, and options of algorithms."""
    yield from _keys_below(Config, "")


def _keys_below(section: type[Section], prefix: str) -> Iterator[tuple[str, FieldInfo]]:
    for name, field in section.model_fields.items():
        key = f"{prefix}{name}"
        yield key, field
        if tuple(key.split(".")) == ALGORITHM:
            yield from ((f"{key}.{option}", field) for option, field in algorithm_options().items())
        elif isinstance(field.annotation, type) and issubclass(field.annotation, Section):
            yield from _keys_below(field.annotation, f"{key}.")


def unknown_key(dotted: str, origin: str) -> str:
    """Return the message for a key that does not exist, with its new name or the nearest keys."""
    section, _, name = dotted.partition(".")
    option = _RENAMED.get(name, name)
    if section == "rl" and option in algorithm_options():
        return (
            f"unknown key {dotted} ({origin}); {option} is an option of the algorithm: write "
            f"--rl.algorithm.{option}=VALUE on the command line, or "
            f"rl: {{algorithm: {{name: {algorithms_with(option)[0]}, {option}: VALUE}}}} in a file"
        )
    near = nearest_keys(dotted)
    hint = f"did you mean {' or '.join(near)}?" if near else f"sections are: {', '.join(SECTIONS)}"
    return f"unknown key {dotted} ({origin}); {hint}"


def nearest_keys(dotted: str) -> list[str]:
    """Return known keys near an unknown one, best first: in the same section, with the same last name, or anywhere."""
    key = tuple(dotted.split("."))
    depth = _known_depth(key)
    parent = key[:depth]
    siblings = difflib.get_close_matches(key[depth], list(_section(parent).model_fields), n=1, cutoff=0.6)
    if siblings:
        return _with_sibling(key, depth, siblings[0])
    leaves = [name for name, field in iter_keys() if not _is_section(field)]
    same_name = [leaf for leaf in leaves if leaf.split(".")[-1] == key[-1]]
    in_section = [leaf for leaf in same_name if parent and leaf.startswith(".".join(parent) + ".")]
    return in_section or same_name or difflib.get_close_matches(dotted, leaves, n=1, cutoff=0.6)


def _known_depth(key: Key) -> int:
    """Return how many of the leading names are sections; at most all but the last."""
    depth = len(key) - 1
    while section_at(key[:depth]) is None:
        depth -= 1
    return depth


def _with_sibling(key: Key, depth: int, sibling: str) -> list[str]:
    """Return the key with one name corrected; if that does not exist either, the nearest to it."""
    corrected = (*key[:depth], sibling, *key[depth + 1 :])
    if exists(corrected):
        return [".".join(corrected)]
    is_deeper = section_at(corrected[: depth + 1]) is not None and len(corrected) > depth + 1
    deeper = nearest_keys(".".join(corrected)) if is_deeper else []
    return deeper or [".".join(corrected[: depth + 1])]


def _section(key: Key) -> type[Section]:
    section = section_at(key)
    if section is None:
        raise KeyError(f"{'.'.join(key)} is no section")
    return section


def _is_section(field: Any) -> bool:
    return isinstance(field.annotation, type) and issubclass(field.annotation, Section)
