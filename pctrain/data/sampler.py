"""The order of the samples, as a pure function of (seed, step)."""

from __future__ import annotations

import numpy as np


class ShuffledSampler:
    """Batches of exactly `batch` indices below `size`.

    The samples are a stream of epochs, each a permutation seeded by (seed, epoch); step s takes the elements s x batch to
    (s + 1) x batch - 1 of that stream, across the end of an epoch where it must. So the step is the whole state: a resumed run asks for
    the step it is at, and gets what an uninterrupted one got.
    """

    def __init__(self, size: int, batch: int, seed: int):
        if size < 1 or batch < 1 or seed < 0:
            raise ValueError(f"size and batch must be 1 or more and seed 0 or more, got {size}, {batch}, {seed}")
        self.size, self.batch, self.seed = size, batch, seed
        self._epochs: dict[int, np.ndarray] = {}

    def indices(self, step: int) -> list[int]:
        """The samples of step `step` (0 is the first). Over `size` consecutive elements of the stream none repeats within an epoch."""
        first, last = step * self.batch, (step + 1) * self.batch - 1
        pieces = []
        for epoch in range(first // self.size, last // self.size + 1):
            start = max(first - epoch * self.size, 0)
            stop = min(last - epoch * self.size + 1, self.size)
            pieces.append(self._permutation(epoch)[start:stop])
        return np.concatenate(pieces).tolist()

    def _permutation(self, epoch: int) -> np.ndarray:
        """int64 [size]. Kept for this epoch and the one before it: a permutation of a million samples takes 20 ms."""
        if epoch not in self._epochs:
            self._epochs = {e: p for e, p in self._epochs.items() if e == epoch - 1}
            self._epochs[epoch] = np.random.default_rng([self.seed, epoch]).permutation(self.size)
        return self._epochs[epoch]
