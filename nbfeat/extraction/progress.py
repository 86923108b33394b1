"""Which images of a run are finished, and how: computed, from the cache, equal to another, or failed."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from nbfeat.extraction.batch import Batch


class Progress:
    """The count of a run over `images` images, each of which needs the features of `lanes` networks."""

    def __init__(self, images: int, lanes: int) -> None:
        self.done = 0  # finished, failed ones too
        self.cached = 0  # have all their features from the cache
        self.equal = 0  # share the features of another of the same content
        self.reasons: dict[int, str] = {}  # an image that failed → why
        self._lacking: NDArray[np.int32] = np.full(images, lanes, np.int32)  # networks whose features are still to come
        self._computed = np.zeros(images, bool)
        self._waiting: dict[int, int] = {}  # an image → the one of the same content that it waits for

    def recount(self, done: Sequence[NDArray[np.bool_]]) -> None:
        """Count again from what each network has `done`: an interrupt may have come between placing and counting."""
        lacking = np.zeros(len(self._lacking), np.int32)
        for mask in done:
            lacking += ~mask
        lacking[list(self.reasons)] = 0
        cached = (lacking == 0) & ~self._computed
        cached[list(self.reasons)] = False
        self._lacking, self._waiting = lacking, {}
        self.done, self.cached = int(np.count_nonzero(lacking == 0)), int(np.count_nonzero(cached))

    def left(self) -> list[int]:
        """Return the images that are not finished, in order."""
        return np.flatnonzero(self._lacking).tolist()

    def take(self, batch: Batch) -> list[tuple[int, int]]:
        """Count a batch; return pairs of images, of which the first now shares the features of the second."""
        for row, reason in batch.failures.items():
            self._fail(row, reason)
        if batch.rows:
            rows = np.array(batch.rows)
            self._lacking[rows] -= 1
            self._computed[rows] |= not batch.cached
            self._finish(rows[self._lacking[rows] == 0])
        self._waiting |= batch.equal
        return self._shared()

    def _shared(self) -> list[tuple[int, int]]:
        ready = [(row, first) for row, first in self._waiting.items() if not self._lacking[first]]
        shared = [pair for pair in ready if pair[1] not in self.reasons]
        for row, first in ready:
            del self._waiting[row]
            if first in self.reasons:
                self._fail(row, self.reasons[first])
        for row, first in shared:
            self._lacking[row], self._computed[row] = 0, self._computed[first]
            self._finish(np.array([row]))
        self.equal += len(shared)
        return shared

    def _finish(self, rows: NDArray[np.int_]) -> None:
        self.done += len(rows)
        self.cached += int(np.count_nonzero(~self._computed[rows]))

    def _fail(self, row: int, reason: str) -> None:
        self.reasons[row], self._lacking[row] = reason, 0
        self.done += 1
