"""Where the features of a run go: into matrices in memory, which become columns of the frame."""

from __future__ import annotations

from collections.abc import Generator, Hashable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from nbfeat.extraction.columns import FeatureColumns, attach, normalized
from nbfeat.extraction.network_state import Batch
from nbfeat.extraction.run import Run

if TYPE_CHECKING:
    import pandas as pd


class MemorySink:
    """Take the features of all images of `run` in memory, and attach them to `frame` when the last is there.

    `fit_on` are the rows to learn normalizations from, or None for all.
    """

    kept_words = "from the cache"
    report_note = ""

    def __init__(
        self,
        run: Run,
        parts: Sequence[FeatureColumns],
        frame: pd.DataFrame,
        fit_on: NDArray[np.bool_] | None,
        *,
        replace: bool,
    ) -> None:
        self._run, self._parts, self._given = run, parts, frame
        self._fit_on, self._replace = fit_on, replace
        self._columns: list[Hashable] = list(dict.fromkeys(part.column for part in parts))
        self._frame: pd.DataFrame | None = None

    @property
    def place(self) -> str:
        """Where the features are, in words."""
        return "of memory"

    @property
    def kept(self) -> int:
        """How many images have their features in the cache, so that another run goes on from there."""
        return self._run.progress.done - len(self._run.progress.reasons) if self._run.keeps else 0

    @property
    def frame(self) -> pd.DataFrame:
        """The given columns, then the features."""
        assert self._frame is not None
        return self._frame

    def held(self) -> AbstractContextManager[None]:
        """Nobody else can write there."""
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
            raw = [part.raw(self._slice(part.column)) for part in self._parts]
            for part, rows in zip(self._parts, raw, strict=True):
                good = self.ok_in(part.column)
                part.learn(rows, good if self._fit_on is None else good & self._fit_on)
            try:
                self._attach(raw)
            except BaseException:
                self._run.forget()  # rows may be half normalized, in place
                raise

    def _attach(self, raw: Sequence[NDArray[np.float32]]) -> None:
        for part, rows in zip(self._parts, normalized(self._parts, raw), strict=True):
            part.rows = rows
        places = [part.place_in(self._given, replace=self._replace) for part in self._parts]
        for part, there in zip(self._parts, places, strict=True):
            part.replaced = bool(there.replaced)
        self._frame = attach(self._given, [part.frame(self._given.index) for part in self._parts], places)
        for lane in self._run.lanes:
            lane.features.clear()  # what no part holds may go

    def ok_in(self, column: Hashable) -> NDArray[np.bool_]:
        """Tell which rows have the features of the images in `column`."""
        good = np.ones(len(self._run.images), bool)
        good[list(self._run.progress.reasons)] = False
        return good[self._slice(column)]

    def _slice(self, column: Hashable) -> slice:
        start = self._columns.index(column) * len(self._given)
        return slice(start, start + len(self._given))
