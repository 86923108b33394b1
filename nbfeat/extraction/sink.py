"""Where the features of a run go: into matrices in memory, which become columns of the frame."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from nbfeat.extraction.columns import attach, normalized
from nbfeat.extraction.network_state import Batch
from nbfeat.extraction.request import Request
from nbfeat.extraction.run import Run

if TYPE_CHECKING:
    import pandas as pd


class MemorySink:
    """Take the features of all images of `run` in memory, and attach them to the frame when the last is there."""

    place = "of memory"  # where the features are, in words
    kept_words = "from the cache"  # where those are that need not be computed
    kept = 0  # images whose features it keeps for another run

    def __init__(self, run: Run, request: Request) -> None:
        self._run, self._request, self._parts = run, request, request.parts
        self._frame: pd.DataFrame | None = None

    @property
    def frame(self) -> pd.DataFrame:
        """The given columns, then the features."""
        assert self._frame is not None
        return self._frame

    def held(self) -> AbstractContextManager[None]:
        """Keep others from writing there: nobody can."""
        return nullcontext()

    def make_room(self) -> None:
        """Take the memory for all features."""
        for part in self._parts:
            part.make_room(len(self._run.images))

    def batches(self) -> Generator[Batch, None, None]:
        """Work until all images are finished, and yield each batch; ask no more to stop."""
        yield from self._run.batches()

    def finish(self) -> None:
        """Normalize, and attach the columns."""
        with self._run.timings.while_attaching():
            raw = [part.raw(self._request.images_of(part.column)) for part in self._parts]
            good, fit_rows = self._run.progress.ok, self._request.fit_rows
            for part, rows in zip(self._parts, raw, strict=True):
                chosen = good[self._request.images_of(part.column)]
                part.learn(rows, chosen if fit_rows is None else chosen & fit_rows)
            try:
                self._attach(raw)
            except BaseException:
                self._run.forget()  # rows may be half normalized, in place
                raise

    def _attach(self, raw: Sequence[NDArray[np.float32]]) -> None:
        frame = self._request.frame
        for part, rows in zip(self._parts, normalized(self._parts, raw), strict=True):
            part.rows = rows
        places = [part.place_in(frame, replace=self._request.replace) for part in self._parts]
        for part, there in zip(self._parts, places, strict=True):
            part.replaced = bool(there.replaced)
        self._frame = attach(frame, [part.frame(frame.index) for part in self._parts], places)
        for lane in self._run.lanes:
            lane.features.clear()  # what no part holds may go
