"""YAML as people write it into configs: bounded in what it may stand for, and with one kind of error, whatever is wrong with it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import yaml

# A few lines of aliases that name aliases would stand for gigabytes.
MOST_DEPTH, MOST_VALUES = 50, 100_000


class Loader(yaml.SafeLoader):
    """YAML, with `1e-5` a number (PyYAML asks for `1.0e-5`) and without dates, which no option takes."""


Loader.yaml_implicit_resolvers = {
    letter: [
        (tag, regexp)
        for tag, regexp in resolvers
        if tag not in ("tag:yaml.org,2002:timestamp", "tag:yaml.org,2002:float")
    ]
    for letter, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(
        r"^(?:[-+]?(?:[0-9]+\.[0-9]*|\.[0-9]+|[0-9]+(?=[eE]))(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$"
    ),
    list("-+0123456789."),
)


def parse(text: str) -> Any:
    """The plain values of a YAML text, within the bounds that hold for a config. yaml.YAMLError where it is none."""
    with composed(text) as (loader, root):
        return None if root is None else construct(loader, root)


@contextmanager
def composed(text: str) -> Iterator[tuple[Loader, yaml.Node | None]]:
    """The loader of a text, and its tree. yaml.YAMLError where it is none."""
    loader = Loader(text)
    try:
        try:
            root = loader.get_single_node()
        except RecursionError:
            raise yaml.YAMLError(f"nested deeper than {MOST_DEPTH} levels") from None
        except ValueError as error:  # an escape such as "\U00110000", which is no character
            raise yaml.YAMLError(str(error)) from None
        if root is not None:
            _measure(root, 0, {})
        yield loader, root
    finally:
        loader.dispose()


def _measure(node: yaml.Node, depth: int, known: dict[int, tuple[int, int]]) -> tuple[int, int]:
    """How many values a tree stands for once its aliases are written out, and how many levels. `known`: the same of nodes, by id."""
    if isinstance(node, yaml.ScalarNode) and any("\ud800" <= character <= "\udfff" for character in node.value):
        raise yaml.YAMLError(f"line {node.start_mark.line + 1}: text with half of a surrogate pair, which is no UTF-8")
    if id(node) not in known and depth <= MOST_DEPTH:
        parts = node.value if isinstance(node, yaml.SequenceNode) else []
        parts = [part for pair in node.value for part in pair] if isinstance(node, yaml.MappingNode) else parts
        measured = [_measure(part, depth + 1, known) for part in parts]
        known[id(node)] = (
            1 + sum(values for values, _ in measured),
            1 + max((levels for _, levels in measured), default=0),
        )
    values, levels = known.get(id(node), (1, 1))
    if depth + levels > MOST_DEPTH:
        raise yaml.YAMLError(f"nested deeper than {MOST_DEPTH} levels, or an alias names what it stands in")
    if values > MOST_VALUES:
        raise yaml.YAMLError(f"more than {MOST_VALUES} values; aliases count as what they stand for")
    return values, levels


def construct(loader: Loader, node: yaml.Node) -> Any:
    """The value of a node. yaml.YAMLError, with its place, where it has none."""
    try:
        return loader.construct_object(node, deep=True)
    except (
        ValueError,
        LookupError,
        AttributeError,
        TypeError,
    ):  # PyYAML at `!!int x`, `!!bool maybe`, `!!timestamp x`, 5,000 digits
        kind = node.tag.rpartition(":")[2]
        raise yaml.constructor.ConstructorError(
            None, None, f"{str(node.value):.60} cannot be read as {kind}", node.start_mark
        ) from None
