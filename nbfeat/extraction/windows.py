"""Windows: a run over some rows of its images at a time, counted together."""

from __future__ import annotations

from collections.abc import Generator, Hashable, Mapping, Sequence
from contextlib import closing
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from nbfeat.extraction.batch import Batch
from nbfeat.images.sources import name_of
from nbfeat.parquet.result_file import Failure

if TYPE_CHECKING:
    from nbfeat.extraction.part import FeatureColumns
    from nbfeat.extraction.run import Run


class Windows:
    """The work of `run` over some rows of all its image `columns` at a time, counted together in its progress."""

    def __init__(self, run: Run, columns: Sequence[Hashable], rows: int) -> None:
        self._run, self._columns, self._rows = run, columns, rows
        self._finished: dict[int, tuple[int, int, int]] = {}  # of each window: images done, cached and equal
        # What is worked on, where it is not finished: its number, its run, which images of the whole it has.
        self._now: tuple[int, Run, list[int]] | None = None

    def recount(self, there: Mapping[int, tuple[range, Sequence[Failure]]]) -> None:
        """Count the windows that are `there` by their rows and failures, and no others."""
        before, self._finished = self._finished, {}
        self._run.progress.reasons.clear()
        for number, (rows, failures) in there.items():
            done = len(rows) * len(self._columns)
            self._finished[number] = before.get(number, (done, done - len(failures), 0))
            places = {str(column): at * self._rows + rows.start for at, column in enumerate(self._columns)}
            self._run.progress.reasons.update({places[one.column] + one.position: one.reason for one in failures})
        self._count()

    def compute(self, number: int, rows: range, parts: Sequence[FeatureColumns]) -> Generator[Batch, None, None]:
        """Work through some rows, or go on with them."""
        if self._now is None or self._now[0] != number:
            images = [place * self._rows + row for place in range(len(self._columns)) for row in rows]
            self._now = number, self._run.over([self._run.images[at] for at in images]), images
            for lane in self._run.lanes:
                lane.features.clear()
            for part in parts:
                part.make_room(len(images))
        run = self._now[1]
        run.join(self._run)
        try:
            with closing(run.batches()) as batches:
                for batch in batches:
                    self._count()
                    yield batch
        finally:
            self._run.computed_elsewhere |= run.computed_elsewhere
            for lane, own in zip(self._run.lanes, run.lanes, strict=True):
                lane.engine = own.engine

    def take(self, rows: range, parts: Sequence[FeatureColumns]) -> tuple[list[NDArray[np.float32]], list[Failure]]:
        """Return what was computed: features of each of the `parts`, and failures in the order of rows."""
        assert self._now is not None
        number, run, images = self._now
        self._now = None
        self._finished[number] = run.progress.done, run.progress.cached, run.progress.equal
        for lane, own in zip(self._run.lanes, run.lanes, strict=True):
            lane.cached += own.cached
        starts = [self._columns.index(part.column) * len(rows) for part in parts]
        reasons = {images[at]: reason for at, reason in run.progress.reasons.items()}
        return [part.raw(slice(start, start + len(rows))) for part, start in zip(parts, starts, strict=True)], [
            Failure(row - rows.start, str(self._columns[place]), name_of(self._run.images[at]), reasons[at])
            for row, place, at in sorted((at % self._rows, at // self._rows, at) for at in reasons)
        ]

    def _count(self) -> None:
        """Count what is finished, and what is worked on, into the progress of the whole run."""
        whole, counts = self._run.progress, list(self._finished.values())
        if self._now:
            _, run, images = self._now
            counts.append((run.progress.done, run.progress.cached, run.progress.equal))
            whole.reasons.update({images[at]: reason for at, reason in run.progress.reasons.items()})
        whole.done, whole.cached, whole.equal = (sum(column) for column in zip(*counts, (0, 0, 0), strict=True))
