"""Near-duplicates: MinHash and LSH bands find candidates, the exact Jaccard similarity of the shingles confirms them.

It takes two passes over the data. The first sketches every text; only 16 bytes per band stay in memory, and no text.
The second asks for the neighbors of each text among those before it. Only texts that share a band with another text are
kept for the comparison, as sorted hashes of their shingles in a scratch file.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterator
from functools import lru_cache
from pathlib import Path

import numpy as np

from pctrain.data.sets.options import NearOptions
from pctrain.data.sets.text import jaccard, mix, shingles

# LSH's bands are chosen by the weighted errors (false candidates, missed pairs). Only missed pairs cost: the exact
# comparison rejects false candidates.
WEIGHTS = (0.02, 0.98)
STEEPEST = 0.95  # above it one band of all permutations would be best, and a single difference would break it


class Sketcher:
    """The shingles of a text, and its LSH keys, one for each of `bands` bands."""

    def __init__(self, options: NearOptions):
        from datasketch import MinHash

        self.bands, self.rows = _bands(min(options.threshold, STEEPEST), options.num_perm)
        self._options = options
        # Shingles are hashes already; MinHash uses 32 bits of them.
        self._empty = MinHash(num_perm=options.num_perm, seed=1, hashfunc=int)

    def shingles(self, text: str) -> np.ndarray:
        """Return the sorted hashes of a text's shingles, uint64 [k]."""
        return shingles(text, self._options.shingle, self._options.ngram)

    def sketch(self, text: str) -> np.ndarray:
        """Return the LSH keys of a text, uint64 [bands].

        Two texts with Jaccard similarity s share a key with probability 1 - (1 - s^rows)^bands.
        """
        minhash = self._empty.copy()
        minhash.update_batch((self.shingles(text) >> np.uint64(32)).tolist())
        minima = minhash.hashvalues[: self.bands * self.rows].astype(np.uint64).reshape(self.bands, self.rows)
        key = np.zeros(self.bands, np.uint64)
        for row in range(self.rows):
            key = mix(key + minima[:, row] + np.uint64(1))
        return key


class Sketches:
    """The sketches of all texts, 8 bytes per band, and their places. A place is the number of a record in the data."""

    def __init__(self) -> None:
        self._places = array("q")
        self._keys = array("Q")

    def add(self, place: int, sketch: np.ndarray) -> None:
        """Add the sketch of the text at a place. Places must ascend."""
        self._places.append(place)
        self._keys.frombytes(sketch.tobytes())

    def places(self) -> np.ndarray:
        """Return the places, int64 [n], ascending."""
        return np.array(self._places, np.int64)

    def groups(self) -> np.ndarray:
        """Return int32 [n, bands]: a number that texts with the same key in a band share, or -1 if no other has it."""
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


class Neighbors:
    """A search for near-duplicates of a text among the texts that `keep` was given.

    Texts are identified by their places.
    """

    def __init__(self, sketches: Sketches, options: NearOptions, scratch: Path):
        self._sketcher, self._threshold = Sketcher(options), options.threshold
        self._places, self._groups = sketches.places(), sketches.groups()
        # The kept texts of a group are a chain: the last one, and for each text the one before it, as rows of
        # `_groups`.
        self._last = np.full(int(self._groups.max(initial=-1)) + 1, -1, np.int32)
        self._before = np.full(self._groups.shape, -1, np.int32)
        self._spans: dict[int, tuple[int, int]] = {}
        self._file = open(scratch, "w+b")  # noqa: SIM115 - `close` closes it
        self._end = 0

    def __contains__(self, place: int) -> bool:
        """Return whether the text shares a band with another one.

        A text that does not needs neither `near` nor `keep`.
        """
        row = self._row(place)
        return row < len(self._places) and self._places[row] == place and bool((self._groups[row] >= 0).any())

    def near(
        self, place: int, text: str, skip: Callable[[int], bool] = lambda other: False
    ) -> Iterator[tuple[int, float]]:
        """Yield (place, exact Jaccard similarity) of the kept texts at or above the threshold, in order of place.

        `skip` is called before a kept text is compared, and returns whether the comparison is unnecessary.
        """
        own_shingles = None
        for other in self._candidates(self._row(place)):
            if skip(other):
                continue
            if own_shingles is None:
                own_shingles = self._sketcher.shingles(text)
            smaller, larger = sorted((len(own_shingles), self._spans[other][1] // own_shingles.itemsize))
            if smaller / larger < self._threshold:  # the similarity is at most this ratio, so nothing needs to be read
                continue
            similarity = jaccard(own_shingles, self._read(other))
            if similarity >= self._threshold:
                yield other, similarity

    def _candidates(self, row: int) -> list[int]:
        """Return the places of the kept texts that share a band with a text, ascending."""
        rows = set()
        for band in np.flatnonzero(self._groups[row] >= 0).tolist():
            other = int(self._last[self._groups[row, band]])
            while other >= 0:
                rows.add(other)
                other = int(self._before[other, band])
        return [int(self._places[other]) for other in sorted(rows)]

    def keep(self, place: int, text: str) -> None:
        """Remember a text as a possible neighbor of later ones."""
        data = self._sketcher.shingles(text).tobytes()
        self._file.seek(self._end)
        self._file.write(data)
        self._spans[place] = (self._end, len(data))
        self._end += len(data)
        row = self._row(place)
        for band in np.flatnonzero(self._groups[row] >= 0).tolist():
            group = self._groups[row, band]
            self._before[row, band] = self._last[group]
            self._last[group] = row

    def _row(self, place: int) -> int:
        return int(np.searchsorted(self._places, place))

    def _read(self, place: int) -> np.ndarray:
        start, size = self._spans[place]
        self._file.seek(start)
        return np.frombuffer(self._file.read(size), np.uint64)

    def close(self) -> None:
        """Close the scratch file."""
        self._file.close()


@lru_cache
def _bands(threshold: float, num_perm: int) -> tuple[int, int]:
    """Return the number of bands and of rows per band.

    datasketch chooses them by integrating the errors of every pair.
    """
    from datasketch import MinHashLSH

    lsh = MinHashLSH(threshold=threshold, num_perm=num_perm, weights=WEIGHTS)
    return lsh.b, lsh.r
