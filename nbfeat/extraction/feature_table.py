"""FeatureTable: the part that extractions and results read from a file share: features, failures, recipe."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Collection, Hashable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from nbfeat.errors import RequestError, listing, near, sentences
from nbfeat.extraction.recipe import Recipe, pack
from nbfeat.extraction.report import Report
from nbfeat.parquet import result_file
from nbfeat.parquet.result_file import Failure

if TYPE_CHECKING:
    import pandas as pd


class FeatureTable:
    """The given columns and the features, the images that failed, and the recipe."""

    def __init__(self, frame: pd.DataFrame, failures: pd.DataFrame, fitted: Recipe) -> None:
        self._frame, self._failures, self._fitted = frame, failures, fitted

    @property
    def frame(self) -> pd.DataFrame:
        """The given columns, then the features, with the same rows and index."""
        return self._frame

    @property
    def failures(self) -> pd.DataFrame:
        """Images without features: position (row number), column, image and reason, indexed like the frame."""
        return self._failures

    @property
    def fitted(self) -> Recipe:
        """The recipe that `like` repeats: blocks, fitted normalization and everything that decides the features."""
        return self._fitted

    @abstractmethod
    def _report(self) -> Report: ...

    @property
    def recipe(self) -> Mapping[str, Any]:
        """Everything needed to repeat this result: blocks, versions, weight hashes, engines and precision."""
        return self.fitted.provenance

    @property
    def columns(self) -> list[str]:
        """Names of the new columns."""
        return [name for part in self.fitted.parts for name in part.names]

    @property
    def features(self) -> pd.DataFrame:
        """Only the new columns, float32; rows that failed are NaN."""
        return self.frame.loc[:, self.columns]

    def __getitem__(self, prefix: str) -> pd.DataFrame:
        """Return one block's columns by their prefix."""
        parts = {part.prefix: part for part in self.fitted.parts}
        return self.frame.loc[:, parts[block_called(prefix, parts)].names]

    @property
    def ok(self) -> pd.Series:
        """Whether each row has all its features: a Series of bool, indexed like the frame."""
        import pandas as pd

        good = np.ones(len(self.frame), bool)
        good[self.failures["position"]] = False
        return pd.Series(good, index=self.frame.index, name="ok")

    def to_parquet(self, path: str | Path, without: Collection[Hashable] = ()) -> None:
        """Write the frame, recipe, fitted normalization and failures to a Parquet file.

        Any Parquet reader reads it as a table; `nbfeat.read` and `like` also read the rest. An interrupted write leaves
        no partial file.

        Parameters
        ----------
        path : str or Path
            The file; an existing one is replaced.
        without : collection of column names, default ()
            Columns of the given frame to omit, e.g. PIL images, which Parquet can't store.

        Raises
        ------
        RequestError
            Parquet can't store a column, or the fitted normalization is too large.

        Examples
        --------
        >>> result.to_parquet("train.parquet")
        >>> test = nbfeat.extract(photos, like="train.parquet", replace=True)
        """
        frame, recipe, failures = self.frame, self.fitted, self.failures
        rows = failures.assign(column=failures["column"].map(str)).itertuples(index=False)
        text = pack(recipe, [Failure(int(position), *rest) for position, *rest in rows])
        result_file.write(path, frame, text, {part.prefix: part.names for part in recipe.parts}, without)

    def __repr__(self) -> str:
        """Return the report as text."""
        return self._report().text()

    def _repr_html_(self) -> str:
        return self._report().html()


def block_called(prefix: str, prefixes: Collection[str]) -> str:
    """Return `prefix` if it is one of `prefixes`, or raise RequestError with similar ones."""
    if prefix in prefixes:
        return prefix
    problem, way = f"The result has no block {prefix!r}.", f"Choose {listing(prefixes, 'or')}."
    raise RequestError(sentences(problem, near(prefix, prefixes), way))


def failure_table(failures: Iterable[tuple[int, Hashable, str, str]], index: pd.Index) -> pd.DataFrame:
    """Return failures as a frame, indexed like the frame with this `index`."""
    import pandas as pd

    table = pd.DataFrame(failures, columns=list(Failure._fields), dtype=object).astype({"position": int})
    return table.set_axis(index.take(table["position"].to_numpy(int)))
