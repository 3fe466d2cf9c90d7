"""The candidates of `pctrain data rank`, from its options."""

from __future__ import annotations

import re
from pathlib import Path

import yaml

from pctrain.common.errors import UserError
from pctrain.data.sets.options import RankOptions
from pctrain.distributed.health import watchdog

NAME = re.compile(r"[\w-][\w.-]*")
TAKEN = ("data", "model", "tokens", watchdog.FOLDER)  # folders of other things beside the candidates' own


def read_candidates(options: RankOptions) -> dict[str, Path]:
    """{name: path}, in the order given. Raises UserError for fewer than two, a name twice or that is no folder's name, seeds twice."""
    pairs = [pair.partition("=")[::2] for pair in options.candidate]
    for pair, text in zip(pairs, options.candidate, strict=True):
        if not all(pair):
            raise UserError(f"--candidate={text}: expected NAME=PATH")
    pairs += [(item["name"], item["path"]) for item in _listed(options.candidates)] if options.candidates else []
    names = [name for name, _ in pairs]
    if len(pairs) < 2:
        raise UserError(
            f"pctrain data rank compares candidates: {len(pairs)} given, expected two or more, --candidate=NAME=PATH each"
        )
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"two candidates have the name {name!r}; give each its own")
        if not NAME.fullmatch(name) or name in TAKEN:
            raise UserError(
                f"candidate {name!r}: expected a name of letters, digits, dot, dash and underscore, and none of "
                f"{', '.join(TAKEN)}: it names a folder"
            )
    if len(set(options.seeds)) < len(options.seeds) or min(options.seeds) < 0:
        raise UserError(f"--seeds={','.join(map(str, options.seeds))}: expected different seeds of 0 or more")
    return {name: Path(path) for name, path in pairs}


def _listed(text: str) -> list[dict[str, str]]:
    try:
        items = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UserError(f"--candidates: not valid YAML: {error}") from None
    good = isinstance(items, list) and all(
        isinstance(item, dict)
        and item.keys() == {"name", "path"}
        and all(isinstance(value, str) for value in item.values())
        for item in items
    )
    if not good:
        raise UserError(
            f"--candidates={text}: expected a list such as [{{name: a, path: a.jsonl}}, {{name: b, path: b.jsonl}}]"
        )
    return items
