"""FeatureTable: what can be read from a finished result, whether it was just extracted or read from a file."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Collection, Hashable, Mapping
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
    """The given columns, then the features; the images that failed; and what it takes to repeat them."""

    def __init__(self, frame: pd.DataFrame, failures: pd.DataFrame, fitted: Recipe) -> None:
        self._frame, self._failures, self._fitted = frame, failures, fitted

    @property
    def frame(self) -> pd.DataFrame:
        """The given columns, then the features: same index, same order, same rows."""
        return self._frame

    @property
    def failures(self) -> pd.DataFrame:
        """The images that gave no features: position, column, image and reason, indexed like the frame."""
        return self._failures

    @property
    def fitted(self) -> Recipe:
        """What `like` repeats: the blocks with all that decides their numbers, and what they learned."""
        return self._fitted

    @abstractmethod
    def _report(self) -> Report: ...

    @property
    def recipe(self) -> Mapping[str, Any]:
        """Everything needed to repeat this result: blocks, versions, hashes of weights, precision, decoding."""
        return self.fitted.provenance

    @property
    def columns(self) -> list[str]:
        """The names of all columns that were made."""
        return [name for part in self.fitted.parts for name in part.names]

    @property
    def features(self) -> pd.DataFrame:
        """Only the columns that were made, float32; rows that failed are NaN."""
        return self.frame.loc[:, self.columns]

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

    def to_parquet(self, path: str | Path, without: Collection[Hashable] = ()) -> None:
        """Write the frame to a Parquet file, with the recipe and what was learned, so that it can be repeated.

        Any reader of Parquet reads it as a table; `nbfeat.read` and `like` read the rest, too. It is written whole or
        not at all.

        Parameters
        ----------
        path
            The file; one that is there is replaced.
        without
            Columns of the given frame to leave out, e.g. one of PIL images, which Parquet cannot hold.

        Raises
        ------
        RequestError
            Where Parquet cannot hold a column, naming it, or what was learned is too large to travel.

        Examples
        --------
        >>> result.to_parquet("train.parquet")  # doctest: +SKIP
        >>> nbfeat.extract(others, like="train.parquet")  # doctest: +SKIP
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
    """Return `prefix` if it is one of the `prefixes` of a result, or raise RequestError with near ones."""
    if prefix in prefixes:
        return prefix
    raise RequestError(
        sentences(f"There is no block {prefix!r}.", near(prefix, prefixes), f"Blocks: {listing(prefixes)}.")
    )
