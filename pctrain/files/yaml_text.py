"""YAML as people write it into configs: bounded in size, and with one kind of error for everything else."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import yaml

# Aliases count as the values they expand to: a few lines of aliases of aliases would expand to gigabytes.
MOST_DEPTH, MOST_VALUES = 50, 100_000
_FLOAT = (
    r"^(?:[-+]?(?:[0-9]+\.[0-9]*|\.[0-9]+|[0-9]+(?=[eE]))(?:[eE][-+]?[0-9]+)?"
    r"|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$"
)


class Loader(yaml.SafeLoader):
    """A YAML loader that reads `1e-5` as a number (PyYAML asks for `1.0e-5`), and no dates, which no option takes."""


Loader.yaml_implicit_resolvers = {
    letter: [
        (tag, regexp)
        for tag, regexp in resolvers
        if tag not in ("tag:yaml.org,2002:timestamp", "tag:yaml.org,2002:float")
    ]
    for letter, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
Loader.add_implicit_resolver("tag:yaml.org,2002:float", re.compile(_FLOAT), list("-+0123456789."))


def parse(text: str) -> Any:
    """Return the plain values of a YAML text. Raises yaml.YAMLError for text that is not YAML or exceeds the bounds."""
    with composed(text) as (loader, root):
        return None if root is None else construct(loader, root)


@contextmanager
def composed(text: str) -> Iterator[tuple[Loader, yaml.Node | None]]:
    """Yield the loader of a text and its node tree. Raises yaml.YAMLError as `parse` does."""
    loader = Loader(text)
    try:
        try:
            root = loader.get_single_node()
        except RecursionError:
            raise yaml.YAMLError(f"nested deeper than {MOST_DEPTH} levels") from None
        except ValueError as error:  # an escape such as "\U00110000", which is not a character
            raise yaml.YAMLError(str(error)) from None
        if root is not None:
            _measure(root, 0, {})
        yield loader, root
    finally:
        loader.dispose()


def _measure(node: yaml.Node, depth: int, known: dict[int, tuple[int, int]]) -> tuple[int, int]:
    """Return (values, levels) of a tree with its aliases expanded. `known` has the same for nodes seen before, by id.

    Raises yaml.YAMLError if a bound is exceeded, or for text that is not UTF-8.
    """
    if isinstance(node, yaml.ScalarNode) and any("\ud800" <= character <= "\udfff" for character in node.value):
        raise yaml.YAMLError(f"line {node.start_mark.line + 1}: half of a surrogate pair, which is not UTF-8")
    if id(node) not in known and depth <= MOST_DEPTH:
        measured = [_measure(part, depth + 1, known) for part in _parts(node)]
        known[id(node)] = (
            1 + sum(values for values, _ in measured),
            1 + max((levels for _, levels in measured), default=0),
        )
    values, levels = known.get(id(node), (1, 1))
    if depth + levels > MOST_DEPTH:
        raise yaml.YAMLError(f"nested deeper than {MOST_DEPTH} levels, or an alias names what contains it")
    if values > MOST_VALUES:
        raise yaml.YAMLError(f"more than {MOST_VALUES} values; aliases count as the values they expand to")
    return values, levels


def _parts(node: yaml.Node) -> list[yaml.Node]:
    """Return the nodes inside a node: items, or keys and values."""
    if isinstance(node, yaml.SequenceNode):
        return node.value
    if isinstance(node, yaml.MappingNode):
        return [part for pair in node.value for part in pair]
    return []


def construct(loader: Loader, node: yaml.Node) -> Any:
    """Return the value of a node. Raises yaml.YAMLError, with its position, if it has none."""
    try:
        return loader.construct_object(node, deep=True)
    except (ValueError, LookupError, AttributeError, TypeError):
        # PyYAML raises these at `!!int x`, `!!bool maybe`, `!!timestamp x`, or 5,000 digits.
        kind = node.tag.rpartition(":")[2]
        raise yaml.constructor.ConstructorError(
            None, None, f"{node.value!s:.60} cannot be read as {kind}", node.start_mark
        ) from None
