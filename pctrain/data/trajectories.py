"""The tokenized trajectories of several sources, numbered as one set."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from pctrain.common.errors import UserError
from pctrain.config.tree import SourceConfig
from pctrain.data.rows import Row, RowSet
from pctrain.data.store import TokenStore

SOURCE = "source"  # the stream that says which source each token is from


class Trajectories:
    """Samples 0 to n - 1: the samples of the first source, then those of the next.

    Attributes:
        names: names of the sources, for metrics.
        weights: passes over each source per epoch.
        sizes: number of samples of each source.
        lengths: int64 [n], number of tokens of each sample.
        loss_tokens: int64 [n], number of tokens of each sample that are trained on.
        source: int64 [n], number of each sample's source.
    """

    def __init__(self, sources: Sequence[SourceConfig], stores: Sequence[TokenStore]):
        self.names = source_names(sources)
        self.weights = [source.weight for source in sources]
        self.stores = list(stores)
        self.sizes = [len(store) for store in stores]
        self.lengths = np.concatenate([store.lengths for store in stores]).astype(np.int64)
        self.loss_tokens = np.concatenate([store.loss_tokens for store in stores]).astype(np.int64)
        self.source = np.repeat(np.arange(len(stores)), self.sizes)
        self._firsts = np.concatenate([[0], np.cumsum(self.sizes)])

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> Row:
        """Return the row of a sample. If there are several sources, the row has the stream `source`."""
        source = int(self.source[index])
        row = self.stores[source][index - int(self._firsts[source])]
        return row if len(self.names) == 1 else replace(row, streams={SOURCE: np.full(len(row), source, np.float32)})

    def select(self, indices: Sequence[int]) -> RowSet:
        """Return the rows of these samples. Each row is read when it is requested."""
        samples = np.asarray(indices, dtype=np.int64)
        streams = (SOURCE,) if len(self.names) > 1 else ()
        loss_tokens = float(self.loss_tokens[samples].sum())
        return RowSet(self.lengths[samples], loss_tokens, lambda i: self[int(samples[i])], streams)

    def id(self, index: int) -> str:
        """Return the id of the record that a sample was made from, for messages."""
        source = int(self.source[index])
        return self.stores[source].id(index - int(self._firsts[source]))

    def describe(self) -> list[str]:
        """Return one line per source with its size and the number of dropped and cut records."""
        lines = []
        for name, store, weight in zip(self.names, self.stores, self.weights, strict=True):
            counts = "".join(f", {count} {cause}" for cause, count in store.counts.items())
            weighted = f", weight {weight:g}" if weight != 1 else ""
            trained = int(store.loss_tokens.sum(dtype=np.int64))
            lines.append(
                f"{name}: {len(store)} trajectories, {store.tokens} tokens, {trained} trained on{weighted}{counts}"
            )
        return lines


def source_names(sources: Sequence[SourceConfig]) -> list[str]:
    """Return the name of each source.

    Raises:
        UserError: two sources have the same name.
    """
    names = [source.name or _name_from_path(source.path) for source in sources]
    duplicates = sorted({name for name in names if names.count(name) > 1})
    if duplicates:
        raise UserError(
            f"two sources of data.train or data.validation have the name {duplicates[0]!r}; expected different names. "
            "Set `name` of one of them."
        )
    return names


def _name_from_path(path: Path) -> str:
    return path.name.split(".")[0] or path.name
