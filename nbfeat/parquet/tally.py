"""Which images each chunk of rows has, and what became of them, counted together for the whole run."""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass, field

from nbfeat.extraction.packed import Failure
from nbfeat.extraction.progress import Progress
from nbfeat.images.sources import name_of

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


@dataclass(slots=True)
class Tally:
    """What became of the images of one chunk."""

    done: int = 0
    cached: int = 0
    equal: int = 0
    reasons: dict[int, str] = field(default_factory=dict)  # an image of the whole run → why it failed

    @classmethod
    def of(cls, progress: Progress, images: Sequence[int]) -> Tally:
        """Count the run over one chunk, whose images are those `images` of the whole run."""
        reasons = {images[at]: reason for at, reason in progress.reasons.items()}
        return cls(progress.done, progress.cached, progress.equal, reasons)

    @classmethod
    def of_file(cls, split: Split, number: int, failures: Sequence[Failure]) -> Tally:
        """Count a chunk that an earlier run has finished."""
        start, done = split.bounds(number)[0], split.size(number) * len(split.columns)
        places = {str(column): at * split.rows + start for at, column in enumerate(split.columns)}
        reasons = {places[one.column] + one.position: one.reason for one in failures}
        return cls(done, done - len(reasons), 0, reasons)

    def failures(self, split: Split, number: int, images: Sequence[object]) -> list[Failure]:
        """Return the failures of a chunk in the order of its rows, for its file; `images` are those of the run."""
        start = split.bounds(number)[0]
        return [
            Failure(row - start, str(split.columns[column]), name_of(images[at]), self.reasons[at])
            for row, column, at in sorted((at % split.rows, at // split.rows, at) for at in self.reasons)
        ]

    @property
    def good(self) -> int:
        """How many images have features."""
        return self.done - len(self.reasons)


class Tallies(dict[int, Tally]):
    """The tallies of finished chunks, by their numbers."""

    _finished = Tally()

    def tell(self, progress: Progress) -> None:
        """Count what is finished into the progress of the whole run; one that was at work may have been given up."""
        self._finished = Tally()
        progress.reasons.clear()
        for tally in self.values():
            self._finished.done += tally.done
            self._finished.cached += tally.cached
            self._finished.equal += tally.equal
            progress.reasons.update(tally.reasons)
        self.tell_beside(progress, Tally())

    def tell_beside(self, progress: Progress, now: Tally) -> None:
        """Count what is at work `now`, too."""
        before = self._finished
        progress.done, progress.cached = before.done + now.done, before.cached + now.cached
        progress.equal = before.equal + now.equal
        progress.reasons.update(now.reasons)
