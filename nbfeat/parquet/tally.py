"""Which images each chunk of rows has, and what became of them, counted together for the whole run."""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass

BYTES = 64_000_000  # of features in one chunk
LEAST_ROWS, MOST_ROWS = 512, 8192  # in one chunk, which is what is lost at most when a process is killed
LARGER = 3  # times as much in one chunk on a cluster, where each has new workers, which take seconds to start


def rows_together(widths: Iterable[int], batch: int, *, on_cluster: bool = False) -> int:
    """Return how many rows make a chunk of features of these `widths`: whole batches."""
    times = LARGER if on_cluster else 1
    rows = min(max(times * BYTES // (4 * sum(widths)), LEAST_ROWS), times * MOST_ROWS)
    return max(1, rows // batch) * batch


@dataclass(frozen=True, slots=True)
class Split:
    """`rows` in chunks of `chunk`; the images of a run are those of its first column, then those of the next."""

    rows: int
    columns: Sequence[Hashable]
    chunk: int

    @property
    def count(self) -> int:
        """How many chunks there are: at least one, which may be empty."""
        return max(1, math.ceil(self.rows / self.chunk))

    def bounds(self, number: int) -> tuple[int, int]:
        """Return the first row of a chunk, and the first after it."""
        return number * self.chunk, min(self.rows, (number + 1) * self.chunk)

    def size(self, number: int) -> int:
        """Return how many rows a chunk has."""
        start, stop = self.bounds(number)
        return stop - start

    def images(self, number: int) -> list[int]:
        """Return which images of the run are those of a chunk, in the order in which a run over them has them."""
        start, stop = self.bounds(number)
        return [place * self.rows + row for place in range(len(self.columns)) for row in range(start, stop)]

    def within(self, number: int, column: Hashable) -> slice:
        """Return which images of a chunk are those of a column."""
        start = self.columns.index(column) * self.size(number)
        return slice(start, start + self.size(number))
