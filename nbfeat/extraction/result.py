"""Result: a finished extraction as it was read from Parquet."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from nbfeat.errors import listing
from nbfeat.extraction import report
from nbfeat.extraction.extraction import Extraction
from nbfeat.extraction.feature_table import FeatureTable
from nbfeat.extraction.recipe import Recipe
from nbfeat.extraction.request import Frame

if TYPE_CHECKING:
    import pandas as pd


class Result(FeatureTable):
    """What an Extraction made, read from the Parquet file that it was written to; `nbfeat.read` makes it."""

    def __init__(self, frame: pd.DataFrame, failures: pd.DataFrame, fitted: Recipe) -> None:
        self._frame, self._failures, self._fitted = frame, failures, fitted

    @property
    def frame(self) -> pd.DataFrame:
        """The columns that were given, then the features."""
        return self._frame

    @property
    def failures(self) -> pd.DataFrame:
        """The images that gave no features: position, column, image and reason, indexed like the frame."""
        return self._failures

    @property
    def fitted(self) -> Recipe:
        """What `like` repeats."""
        return self._fitted

    def like(self, frame: Frame, **options: Any) -> Extraction:
        """Repeat this on another frame, to the end, as `Extraction.like` does."""
        return Extraction(frame, like=self, **options).run()

    def _report(self) -> report.Report:
        width, rows, source = len(self.columns), len(self.frame), self.fitted.source
        return report.Report(
            headline=f"{width:,} columns of features of {rows:,} rows, read from {source}",
            blocks=[report.read_row(part) for part in self.fitted.parts],
            failed=report.failed(len(self.failures), rows * len(self.fitted.columns)),
            failures=report.first(self.failures),
            footer=f"made by {listing(self.recipe['engines']) or 'nothing'} · {self.fitted.precision}",
        )
