"""The order of the samples, as a pure function of (seed, step)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


class ShuffledSampler:
    """Batches of exactly `batch` indices of the samples of one or several sources, numbered through: 0 to sum(sizes) - 1.

    The samples are a stream of epochs; step s takes the elements s x batch to (s + 1) x batch - 1 of that stream, across the end of an
    epoch where it must. So the step is the whole state: a resumed run asks for the step it is at, and gets what an uninterrupted one got.

    An epoch shows a source of n samples and weight w about w x n of them (over e epochs exactly floor(e x w x n)), in an order seeded by
    (seed, epoch). No sample of a source comes again before all others of it have.
    """

    def __init__(self, sizes: Sequence[int], batch: int, seed: int, weights: Sequence[float] | None = None):
        weights = [1.0] * len(sizes) if weights is None else list(weights)
        if not sizes or min(sizes) < 1 or batch < 1 or seed < 0 or len(weights) != len(sizes) or min(weights) <= 0:
            raise ValueError(
                f"sizes, batch and weights must be above 0 and seed 0 or more, got {list(sizes)}, {batch}, {weights}, {seed}"
            )
        self.sizes, self.batch, self.seed, self.weights = list(sizes), batch, seed, weights
        self._firsts = np.concatenate([[0], np.cumsum(self.sizes)])
        self._epochs: dict[int, np.ndarray] = {}

    @property
    def samples_per_epoch(self) -> float:
        return sum(size * weight for size, weight in zip(self.sizes, self.weights, strict=True))

    def indices(self, step: int) -> list[int]:
        """The samples of step `step` (0 is the first)."""
        position, end = step * self.batch, (step + 1) * self.batch
        epoch = self._epoch_at(position)
        pieces = []
        while position < end:
            start, stop = self._begin(epoch), self._begin(epoch + 1)
            pieces.append(self._order(epoch)[position - start : end - start])
            position, epoch = min(stop, end), epoch + 1
        return np.concatenate(pieces).tolist()

    def _begin(self, epoch: int) -> int:
        """Where an epoch begins in the stream."""
        return sum(self._taken(source, epoch) for source in range(len(self.sizes)))

    def _taken(self, source: int, epochs: int) -> int:
        """How many samples of a source the first `epochs` epochs show."""
        return int(epochs * self.weights[source] * self.sizes[source])

    def _epoch_at(self, position: int) -> int:
        """The epoch that the element `position` of the stream belongs to."""
        epoch = int(position / self.samples_per_epoch)
        while self._begin(epoch) > position:
            epoch -= 1
        while self._begin(epoch + 1) <= position:
            epoch += 1
        return epoch

    def _order(self, epoch: int) -> np.ndarray:
        """int64 [samples of this epoch]. Kept for this epoch and the one before it: shuffling a million samples takes 20 ms."""
        if epoch not in self._epochs:
            self._epochs = {e: p for e, p in self._epochs.items() if e == epoch - 1}
            shown = np.concatenate([self._firsts[s] + self._of_source(s, epoch) for s in range(len(self.sizes))])
            self._epochs[epoch] = shown[np.random.default_rng([self.seed, epoch]).permutation(len(shown))]
        return self._epochs[epoch]

    def _of_source(self, source: int, epoch: int) -> np.ndarray:
        """What an epoch shows of a source: elements of its own stream of passes. A whole pass need not be shuffled: the epoch is."""
        size, pieces = self.sizes[source], [np.zeros(0, np.int64)]
        start, stop = self._taken(source, epoch), self._taken(source, epoch + 1)
        for number in range(start // size, -(-stop // size)):
            a, b = max(start - number * size, 0), min(stop - number * size, size)
            whole = b - a == size
            pieces.append(
                np.arange(size)
                if whole
                else np.random.default_rng([self.seed, number, source, 1]).permutation(size)[a:b]
            )
        return np.concatenate(pieces)
