"""Result: a finished extraction as it was read from a file."""

from __future__ import annotations

from collections.abc import Collection, Hashable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from nbfeat.errors import listing
from nbfeat.extraction import report
from nbfeat.extraction.columns import block_called, spanned
from nbfeat.extraction.recipe import Recipe
from nbfeat.html import details, paragraph, table, text_table

if TYPE_CHECKING:
    import pandas as pd

    from nbfeat.extraction.extraction import Extraction
    from nbfeat.extraction.request import Frame


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class Result:
    """What an Extraction made, read from the Parquet file that it was written to; `nbfeat.read` makes it."""

    frame: pd.DataFrame  # the columns that were given, then the features
    failures: pd.DataFrame  # position, column, image and reason, indexed like the frame
    fitted: Recipe  # what `like` repeats

    @property
    def features(self) -> pd.DataFrame:
        """Only the columns that were made, float32; rows that failed are NaN."""
        return self.frame.loc[:, self.columns]

    @property
    def columns(self) -> list[str]:
        """The names of all columns that were made."""
        return [name for part in self.fitted.parts for name in part.names]

    def __getitem__(self, prefix: str) -> pd.DataFrame:
        """Return one block's columns."""
        parts = {part.prefix: part for part in self.fitted.parts}
        return self.frame.loc[:, parts[block_called(prefix, parts)].names]

    @property
    def ok(self) -> pd.Series:
        """Whether a row has all its features; indexed like the frame."""
        import pandas as pd

        good = np.ones(len(self.frame), bool)
        good[self.failures["position"]] = False
        return pd.Series(good, index=self.frame.index, name="ok")

    @property
    def recipe(self) -> Mapping[str, Any]:
        """Everything needed to repeat this result: blocks, versions, hashes of weights, precision, decoding."""
        return self.fitted.told

    def like(self, frame: Frame, **options: Any) -> Extraction:
        """Repeat this on another frame, to the end, as `Extraction.like` does."""
        from nbfeat.extraction.extraction import Extraction

        return Extraction(frame, like=self, **options).run()

    def to_parquet(self, path: str | Path, without: Collection[Hashable] = ()) -> None:
        """Write it again, as `Extraction.to_parquet` does."""
        from nbfeat.extraction.reading import write

        write(path, self.frame, self.fitted, self.failures, without)

    def __repr__(self) -> str:
        """Return what it holds as text."""
        lines = [self._headline, report.indented(text_table(self._blocks, report.HEAD))]
        if len(self.failures):
            rows = [(position, image, report.shorten(reason)) for position, image, reason in self._failures]
            lines += [self._failed, report.indented(text_table(rows, report.FAILURES))]
        return "\n".join([*lines, self._footer])

    def _repr_html_(self) -> str:
        parts = [paragraph(self._headline, strong=True), table(self._blocks, report.HEAD)]
        if len(self.failures):
            parts.append(details(self._failed, table(self._failures, report.FAILURES)))
        return "".join([*parts, report.faint(self._footer)])

    @property
    def _headline(self) -> str:
        return f"{len(self.columns):,} columns of features of {len(self.frame):,} rows, read from {self.fitted.source}"

    @property
    def _blocks(self) -> list[tuple[str, int, str]]:
        return [
            (spanned(part.names), len(part.names), f"{part.column}: {report.briefly(part.block)}")
            for part in self.fitted.parts
        ]

    @property
    def _failed(self) -> str:
        return report.failed({"failed": len(self.failures), "total": len(self.frame) * len(self.fitted.columns)})

    @property
    def _failures(self) -> list[list[Any]]:
        first = self.failures.head(report.FAILURES_SHOWN)
        return [list(row) for row in first[["position", "image", "reason"]].to_numpy().tolist()]

    @property
    def _footer(self) -> str:
        return f"made by {listing(self.fitted.told['engines']) or 'nothing'} · {self.fitted.precision}"
