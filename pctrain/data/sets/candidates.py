"""The candidate sets of `pctrain data rank`, read from its options."""

from __future__ import annotations

import re
from pathlib import Path

import yaml

from pctrain.common.errors import UserError
from pctrain.data.sets.options import RankOptions
from pctrain.distributed.health import watchdog

NAME = re.compile(r"[\w-][\w.-]*")
TAKEN = ("data", "model", "tokens", watchdog.FOLDER)  # other folders next to those of the candidates


def read_candidates(options: RankOptions) -> dict[str, Path]:
    """Return {name: path} in the order given.

    Raises:
        UserError: there are fewer than two candidates, two have the same name, a name cannot be a folder's, or a seed
            is repeated.
    """
    pairs = [_parse_pair(text) for text in options.candidate]
    if options.candidates:
        pairs += [(item["name"], item["path"]) for item in _parse_list(options.candidates)]
    names = [name for name, _ in pairs]
    if len(pairs) < 2:
        raise UserError(
            f"pctrain data rank compares candidates: {len(pairs)} given, expected two or more. "
            "Add --candidate=NAME=PATH for each."
        )
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"two candidates have the name {name!r}; expected different names")
        if not NAME.fullmatch(name) or name in TAKEN:
            raise UserError(
                f"candidate {name!r}: expected a name of letters, digits, dot, dash and underscore, other than "
                f"{', '.join(TAKEN)}. It is used as the name of a folder."
            )
    if len(set(options.seeds)) < len(options.seeds) or min(options.seeds) < 0:
        raise UserError(f"--seeds={','.join(map(str, options.seeds))}: expected different seeds of 0 or more")
    return {name: Path(path) for name, path in pairs}


def _parse_pair(text: str) -> tuple[str, str]:
    name, _, path = text.partition("=")
    if not name or not path:
        raise UserError(f"--candidate={text}: expected NAME=PATH")
    return name, path


def _parse_list(text: str) -> list[dict[str, str]]:
    try:
        items = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UserError(f"--candidates: not valid YAML: {error}") from None
    if not isinstance(items, list) or not all(map(_is_candidate, items)):
        raise UserError(
            f"--candidates={text}: expected a list such as [{{name: a, path: a.jsonl}}, {{name: b, path: b.jsonl}}]"
        )
    return items


def _is_candidate(item: object) -> bool:
    return (
        isinstance(item, dict)
        and item.keys() == {"name", "path"}
        and all(isinstance(value, str) for value in item.values())
    )
