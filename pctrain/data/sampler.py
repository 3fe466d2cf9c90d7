"""The order of the samples, as a pure function of (seed, step)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


class ShuffledSampler:
    """Batches of exactly `batch` sample indices from one or several sources, numbered jointly from 0 to sum(sizes) - 1.

    The samples form a stream of epochs. Step s takes elements s x batch to (s + 1) x batch - 1 of the stream, across
    the end of an epoch if necessary. So the step is the whole state: a resumed run asks for its step and gets what an
    uninterrupted run got.

    An epoch contains about w x n samples of a source with n samples and weight w; e epochs contain exactly floor(e x w
    x n). Their order is seeded by (seed, epoch). No sample of a source repeats before all others of that source have
    been used.
    """

    def __init__(self, sizes: Sequence[int], batch: int, seed: int, weights: Sequence[float] | None = None):
        weights = [1.0] * len(sizes) if weights is None else list(weights)
        if not sizes or min(sizes) < 1 or batch < 1 or seed < 0 or len(weights) != len(sizes) or min(weights) <= 0:
            raise ValueError(
                "sizes, batch and weights must be above 0 and seed 0 or more, "
                f"got {list(sizes)}, {batch}, {weights}, {seed}"
            )
        self.sizes = list(sizes)
        self.batch = batch
        self.seed = seed
        self.weights = weights
        self._firsts = np.concatenate([[0], np.cumsum(self.sizes)])
        self._epochs: dict[int, np.ndarray] = {}

    @property
    def samples_per_epoch(self) -> float:
        """The average number of samples in an epoch."""
        return sum(size * weight for size, weight in zip(self.sizes, self.weights, strict=True))

    def indices(self, step: int) -> list[int]:
        """Return the samples of step `step`; the first step is 0."""
        position, end = step * self.batch, (step + 1) * self.batch
        epoch = self._epoch_at(position)
        pieces = []
        while position < end:
            start, stop = self._begin(epoch), self._begin(epoch + 1)
            pieces.append(self._order(epoch)[position - start : end - start])
            position, epoch = min(stop, end), epoch + 1
        return np.concatenate(pieces).tolist()

    def _begin(self, epoch: int) -> int:
        """Return the position in the stream at which an epoch begins."""
        return sum(self._taken(source, epoch) for source in range(len(self.sizes)))

    def _taken(self, source: int, epochs: int) -> int:
        """Return the number of samples of a source in the first `epochs` epochs."""
        return int(epochs * self.weights[source] * self.sizes[source])

    def _epoch_at(self, position: int) -> int:
        """Return the epoch of the element at `position` of the stream."""
        epoch = int(position / self.samples_per_epoch)
        while self._begin(epoch) > position:
            epoch -= 1
        while self._begin(epoch + 1) <= position:
            epoch += 1
        return epoch

    def _order(self, epoch: int) -> np.ndarray:
        """Return the samples of an epoch in order, int64 [n].

        The orders of this epoch and the previous one are kept, because shuffling a million samples takes 20 ms.
        """
        if epoch not in self._epochs:
            self._epochs = {e: order for e, order in self._epochs.items() if e == epoch - 1}
            parts = [self._firsts[s] + self._source_samples(s, epoch) for s in range(len(self.sizes))]
            samples = np.concatenate(parts)
            self._epochs[epoch] = samples[np.random.default_rng([self.seed, epoch]).permutation(len(samples))]
        return self._epochs[epoch]

    def _source_samples(self, source: int, epoch: int) -> np.ndarray:
        """Return the samples of a source in an epoch, from the stream of passes over the source.

        A whole pass is not shuffled here, because the epoch is.
        """
        size, pieces = self.sizes[source], [np.zeros(0, np.int64)]
        start, stop = self._taken(source, epoch), self._taken(source, epoch + 1)
        for number in range(start // size, -(-stop // size)):
            first, end = max(start - number * size, 0), min(stop - number * size, size)
            if end - first == size:
                pieces.append(np.arange(size))
            else:
                order = np.random.default_rng([self.seed, number, source, 1]).permutation(size)
                pieces.append(order[first:end])
        return np.concatenate(pieces)
