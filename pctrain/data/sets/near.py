"""Near-duplicates: candidates by MinHash and LSH bands, each confirmed by the exact Jaccard similarity of the shingles.

Two readings of the data: the first sketches every text (16 bytes a band stay in memory, no text does); the second asks for the
neighbours of a text among those read before it. Only texts that share a band with another one are kept for the comparison, as sorted
hashes of their shingles in a scratch file.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterator
from functools import lru_cache
from pathlib import Path

import numpy as np

from pctrain.data.sets.options import NearOptions
from pctrain.data.sets.text import jaccard, mixed, shingles

# Of the errors that LSH's bands are chosen by, a missed pair is the one that costs: a false candidate is found out by the exact comparison.
WEIGHTS = (0.02, 0.98)
STEEPEST = 0.95  # above it one band of all permutations would be best, which a single different one breaks


class Sketcher:
    """From a text to its shingles, and to one LSH key for each of `bands` bands."""

    def __init__(self, options: NearOptions):
        from datasketch import MinHash

        self.bands, self.rows = _bands(min(options.threshold, STEEPEST), options.num_perm)
        self._options = options
        # Shingles are hashes already; MinHash takes 32 bits of them.
        self._empty = MinHash(num_perm=options.num_perm, seed=1, hashfunc=int)

    def shingles(self, text: str) -> np.ndarray:
        return shingles(text, self._options.shingle, self._options.ngram)

    def sketch(self, text: str) -> np.ndarray:
        """uint64 [bands]. Two texts of Jaccard similarity s have a key of theirs in common with probability 1 - (1 - s^rows)^bands."""
        minhash = self._empty.copy()
        minhash.update_batch((self.shingles(text) >> np.uint64(32)).tolist())
        minima = minhash.hashvalues[: self.bands * self.rows].astype(np.uint64).reshape(self.bands, self.rows)
        key = np.zeros(self.bands, np.uint64)
        for row in range(self.rows):
            key = mixed(key + minima[:, row] + np.uint64(1))
        return key


class Sketches:
    """The sketches of all texts, 8 bytes a band, and their places (the number of the record in the data)."""

    def __init__(self) -> None:
        self._places = array("q")
        self._keys = array("Q")

    def add(self, place: int, sketch: np.ndarray) -> None:
        self._places.append(place)
        self._keys.frombytes(sketch.tobytes())

    def places(self) -> np.ndarray:
        """int64 [n], ascending."""
        return np.array(self._places, np.int64)

    def groups(self) -> np.ndarray:
        """int32 [n, bands]: a number that the texts with the same key in this band share; -1 where the key is a text's own."""
        if not self._places:
            return np.empty((0, 1), np.int32)
        keys = np.frombuffer(self._keys, np.uint64).reshape(len(self._places), -1)
        groups = np.full(keys.shape, -1, np.int32)
        count = 0
        for band in range(keys.shape[1]):
            _, group, members = np.unique(keys[:, band], return_inverse=True, return_counts=True)
            shared = members > 1
            numbers = np.where(shared, count + np.cumsum(shared) - 1, -1)
            groups[:, band] = numbers[group]
            count += int(shared.sum())
        return groups


class Neighbours:
    """Texts remembered by `keep`, and those of them that a new text is near to. Texts are named by their places."""

    def __init__(self, sketches: Sketches, options: NearOptions, scratch: Path):
        self._sketcher, self._threshold = Sketcher(options), options.threshold
        self._places, self._groups = sketches.places(), sketches.groups()
        # The kept texts of a group as a chain: the last one, and for each the one before it, as rows of `_groups`.
        self._last = np.full(int(self._groups.max(initial=-1)) + 1, -1, np.int32)
        self._before = np.full(self._groups.shape, -1, np.int32)
        self._spans: dict[int, tuple[int, int]] = {}
        self._file = open(scratch, "w+b")
        self._end = 0

    def __contains__(self, place: int) -> bool:
        """Whether the text shares a band with another one; one that does not needs neither `near` nor `keep`."""
        row = self._row(place)
        return row < len(self._places) and self._places[row] == place and bool((self._groups[row] >= 0).any())

    def near(
        self, place: int, text: str, skip: Callable[[int], bool] = lambda other: False
    ) -> Iterator[tuple[int, float]]:
        """(place, exact Jaccard similarity) of the kept texts at or above the threshold, in order of place.

        skip: whether a kept text need not be compared, asked just before it would be.
        """
        mine = None
        for other in self._candidates(self._row(place)):
            if skip(other):
                continue
            mine = self._sketcher.shingles(text) if mine is None else mine
            smaller, larger = sorted((len(mine), self._spans[other][1] // mine.itemsize))
            if smaller / larger < self._threshold:  # the similarity is at most that: nothing needs to be read
                continue
            similarity = jaccard(mine, self._read(other))
            if similarity >= self._threshold:
                yield other, similarity

    def _candidates(self, row: int) -> list[int]:
        """Places of the kept texts that share a band with a text, ascending."""
        found = set()
        for band in np.flatnonzero(self._groups[row] >= 0).tolist():
            other = int(self._last[self._groups[row, band]])
            while other >= 0:
                found.add(other)
                other = int(self._before[other, band])
        return [int(self._places[other]) for other in sorted(found)]

    def keep(self, place: int, text: str) -> None:
        data = self._sketcher.shingles(text).tobytes()
        self._file.seek(self._end)
        self._file.write(data)
        self._spans[place] = (self._end, len(data))
        self._end += len(data)
        row = self._row(place)
        for band in np.flatnonzero(self._groups[row] >= 0).tolist():
            group = self._groups[row, band]
            self._before[row, band], self._last[group] = self._last[group], row

    def _row(self, place: int) -> int:
        return int(np.searchsorted(self._places, place))

    def _read(self, place: int) -> np.ndarray:
        start, size = self._spans[place]
        self._file.seek(start)
        return np.frombuffer(self._file.read(size), np.uint64)

    def close(self) -> None:
        self._file.close()


@lru_cache
def _bands(threshold: float, num_perm: int) -> tuple[int, int]:
    """(bands, rows in each) by datasketch's choice, which integrates the errors for every pair of them."""
    from datasketch import MinHashLSH

    lsh = MinHashLSH(threshold=threshold, num_perm=num_perm, weights=WEIGHTS)
    return lsh.b, lsh.r
